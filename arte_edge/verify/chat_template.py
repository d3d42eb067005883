"""Chat template checks: both models must render the same text from a conversation, and tokenize it equally.

Each side uses its own chat template, special tokens and tokenizer, as for its users. If a template rejects a
conversation (Gemma's has no system role), the other must reject it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from arte_edge.runtimes.prompt_render import FIXED_DAY, Conversation, Message, applied, shows_system
from arte_edge.runtimes.protocol import Rendered, Runtime
from arte_edge.verify.check import Check, Thresholds
from arte_edge.verify.tokenizer import excerpt, first_difference


def _turns(*contents: str, system: str | None = None) -> list[Message]:
    head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return head + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


_THINKING = _turns("<think>\nhm\n</think>\n\nyes?", "<think>\nso\n</think>\n\nYes.", "Why?")
CONVERSATIONS: tuple[list[Message], ...] = (
    _turns("What is 17 + 25?"),
    _turns("Is the sky green?", system="Answer in one word."),
    _turns("Hi", "Hello! How can I help?", "Name three fruits.", "Apple, pear, plum.", "And one more?"),
    _turns(
        "Question: Is 4 even?",
        "Let's think step by step. 4 = 2 * 2. <ans>even</ans>",
        "Question: Is 7 even?",
        system="Say whether a number is even or odd.\nEnd with the final answer between <ans> and </ans>.",
    ),
    _turns("日本語で答えてください 🙂 — «naïve» מה שלומך", system="Sei höflich. 请用中文。"),
    _turns("  blanks before and after  \n\n", " and here\n", "\tx", system=" \n"),
    _turns("An empty system message.", system=""),
    _turns(""),
    _turns("<b>\"quotes\" & 'more'</b> {{ braces }} {% if %} \\n", "{'a': 1}", "```python\nprint(1)\n```"),
    _turns("<|im_end|> <end_of_turn> </s> <|eot_id|> as text"),
    _THINKING,
    _turns("1\n\n\n2\r\n3", "a" * 400, "b " * 200),
)
_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
_WEATHER = {"name": "weather", "description": "Today's weather", "parameters": _PARAMETERS}
_TOOLS = Conversation(_turns("Will it rain?"), [{"type": "function", "function": _WEATHER}])
# Nobody sends these to a student, which neither thinks aloud nor calls tools: programs may differ in them.
_RARE = {CONVERSATIONS.index(_THINKING): "with an earlier <think> block", len(CONVERSATIONS): "with tools"}
_ALL = f"{len(CONVERSATIONS)} conversations"


def _in_jinja2(model: Runtime, whats: Sequence[Conversation], day: date = FIXED_DAY) -> Rendered:
    """Return what the model's template makes of conversations where the student was trained and is measured."""
    template, special = model.chat_template or "", model.special_tokens
    return Rendered.by("jinja2", lambda what: applied(template, what, special, day), whats)


def check_templates(reference: Runtime, artifact: Runtime, limits: Thresholds) -> list[Check]:
    """Compare all of `CONVERSATIONS` as text, as token ids, and as each side's own programs render them."""
    allowed = limits.template_differences
    if reference.chat_template is None and artifact.chat_template is None:
        return [Check("template", 0, allowed, True, "Neither has a chat template.")]
    if reference.chat_template is None or artifact.chat_template is None:
        lacking = "reference" if reference.chat_template is None else "artifact"
        note = f"The {lacking} has no chat template, but the other model has one."
        return [Check("template", len(CONVERSATIONS), allowed, allowed is None, note)]
    whats = [Conversation(messages) for messages in CONVERSATIONS]
    ours, theirs = _in_jinja2(reference, whats), _in_jinja2(artifact, whats)
    pairs = list(zip(ours.texts, theirs.texts, strict=True))
    texts = [pair for pair in pairs if pair[0] != pair[1]]
    n, note = len(texts), _explain(*texts[0], len(texts)) if texts else _ALL
    if ours.texts[0] is None:  # then it can hardly render anything, and both sides would agree on nothing
        n, note = len(pairs), f"The reference's template does not render a user's message: {ours.refusal}."
    passed = allowed is None or n <= allowed
    checks = [Check("template", n, allowed, passed, note), _check_ids(reference, artifact, pairs, limits)]
    return [*checks, _check_programs(reference, artifact, allowed)]


def _check_programs(reference: Runtime, artifact: Runtime, allowed: int | None) -> Check:
    """Compare what the programs that run a model make of its template with what jinja2 makes of it.

    Conversations that the template itself rejects are not compared, nor those whose system text it leaves out: the
    programs merge it into the user's turn, each in its own way.
    """
    whats = [*map(Conversation, CONVERSATIONS), _TOOLS]
    rows = {row.program: (model, row) for model in (reference, artifact) for row in model.renderings(whats)}
    wrong: set[int] = set()
    faults, remarks = [], []
    for program, (model, row) in rows.items():
        if row.unable:
            remarks.append(f"{program} gives no answer: {row.unable}")
            continue
        if not row.texts:
            wrong.update(range(len(CONVERSATIONS)))
            faults.append(f"{program} does not start with this chat template: {row.refusal}")
            continue
        taken = [_takes_system(model, what) for what in whats]
        if not all(taken):
            remarks.append("the template takes no system text: conversations with one were not compared")
        expected, of_today = _in_jinja2(model, whats), _in_jinja2(model, whats, date.today())
        ours, dated, theirs = (
            [text and text.removeprefix(row.begin) for text in rendered.texts] for rendered in (expected, of_today, row)
        )
        differ = [i for i, text in enumerate(ours) if taken[i] and text is not None and text != theirs[i]]
        lasting = [i for i in differ if theirs[i] != dated[i]]
        counted = [i for i in lasting if i not in _RARE]
        if counted and row.instead:
            shown = _difference(row, ours, theirs, counted)
            remarks.append(f"{shown}, which is not the file's fault: {row.instead}")
        elif counted:
            wrong.update(counted)
            faults.append(_difference(row, ours, theirs, counted))
        elif lasting:
            remarks.append(f"{program} renders a conversation {_RARE[lasting[0]]} differently")
        if len(lasting) < len(differ):
            remarks.append(f"{program} writes today's date, training wrote {FIXED_DAY}")
    note = "; ".join(faults or dict.fromkeys(remarks))
    note = note or f"{_ALL} in {', '.join(rows) or 'no program of its own'}"
    passed = allowed is None or len(wrong) <= allowed
    return Check("template programs", len(wrong), allowed, passed, f"{note}.")


def _takes_system(model: Runtime, what: Conversation) -> bool:
    try:
        return shows_system(model.chat_template or "", what.messages, model.special_tokens)
    except Exception:  # a template is a downloaded program: this one renders no conversation with a system text
        return False


def _difference(row: Rendered, ours: Sequence[str | None], theirs: Sequence[str | None], differ: Sequence[int]) -> str:
    expected, found = ours[differ[0]], theirs[differ[0]]
    if expected is None or found is None:
        return f"{row.program} renders {len(differ)} of {_ALL} not at all: {row.refusal}"
    at = first_difference(expected, found)
    return (
        f"{row.program} renders {len(differ)} of {_ALL} differently from jinja2, first at character {at}: "
        f"{excerpt(found, at)} for {excerpt(expected, at)}"
    )


def _check_ids(
    reference: Runtime, artifact: Runtime, pairs: list[tuple[str | None, str | None]], limits: Thresholds
) -> Check:
    n = runtime = 0
    for ours, theirs in pairs:
        if ours is None or theirs is None:
            n += ours != theirs
            continue
        expected = reference.tokenize(ours)
        if artifact.tokenize(theirs) != expected:
            by_runtime = artifact.file_tokens(theirs) == expected
            runtime += by_runtime
            n += not by_runtime
    many = limits.runtime_differences is not None and runtime > limits.runtime_differences
    allowed = limits.template_differences
    note = _ALL
    if n:
        note = (
            f"{n} of {_ALL} have different token ids; see the template check, or special tokens are parsed differently."
        )
    elif runtime:
        note = f"{runtime} of {_ALL} are tokenized differently by {artifact.facts.runtime.split()[0]} itself."
    passed = (allowed is None or n <= allowed) and not many
    return Check("template ids", n + (runtime if many else 0), allowed, passed, note)


def _explain(ours: str | None, theirs: str | None, n: int) -> str:
    if ours is None or theirs is None:
        rejects = "reference" if ours is None else "artifact"
        return f"The {rejects}'s template rejects a conversation that the other renders."
    at = first_difference(ours, theirs)
    return (
        f"{n} of {len(CONVERSATIONS)} conversations render differently, first at character {at}: reference "
        f"{excerpt(ours, at)}, artifact {excerpt(theirs, at)}; most likely another model's template, "
        "or a different BOS or EOS text."
    )

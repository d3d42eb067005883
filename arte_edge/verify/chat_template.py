"""Chat template checks: both models must render the same text from a conversation, and tokenize it equally.

Each side uses its own chat template, special tokens and tokenizer, as for its users. If a template rejects a
conversation (Gemma's has no system role), the other must reject it too.
"""

from __future__ import annotations

from arte_edge.errors import InputError
from arte_edge.runtimes.prompt_render import Message
from arte_edge.runtimes.protocol import Runtime
from arte_edge.verify.check import Check
from arte_edge.verify.thresholds import Thresholds
from arte_edge.verify.tokenizer import excerpt, first_difference

__all__ = ["CONVERSATIONS", "check_templates"]


def _turns(*contents: str, system: str | None = None) -> list[Message]:
    head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return head + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


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
    _turns("<think>\nhm\n</think>\n\nyes?", "<think>\nso\n</think>\n\nYes.", "Why?"),
    _turns("1\n\n\n2\r\n3", "a" * 400, "b " * 200),
)
_ALL = f"{len(CONVERSATIONS)} conversations"


def _rendered(model: Runtime, messages: list[Message]) -> str | None:
    """Return the rendered text, None if the template rejects the messages."""
    try:
        return model.render(messages)
    except InputError:
        return None


def check_templates(reference: Runtime, artifact: Runtime, limits: Thresholds) -> list[Check]:
    """Compare all of `CONVERSATIONS` as text, and as token ids of each side's own text."""
    allowed = limits.template_differences
    if reference.chat_template is None and artifact.chat_template is None:
        return [Check("template", 0, allowed, True, "Neither has a chat template.")]
    if reference.chat_template is None or artifact.chat_template is None:
        lacking = "reference" if reference.chat_template is None else "artifact"
        note = f"The {lacking} has no chat template, but the other model has one."
        return [Check("template", len(CONVERSATIONS), allowed, allowed is None, note)]
    pairs = [(_rendered(reference, c), _rendered(artifact, c)) for c in CONVERSATIONS]
    texts = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
    note = _explain(*texts[0], len(texts)) if texts else _ALL
    same_text = Check("template", len(texts), allowed, allowed is None or len(texts) <= allowed, note)
    return [same_text, _check_ids(reference, artifact, pairs, limits)]


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
            f"{n} of {_ALL} have different token ids; see the template check, or special tokens are parsed "
            "differently."
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

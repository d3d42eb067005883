"""The form of a student's answers, and the instruction that goes with it.

A student is trained, evaluated, verified and used through one prompt: a bare user message, rendered by a chat template
that holds the instruction as its default system text (`with_instruction`). Three forms of an answer:

* ``answer``: the answer alone, such as a label. The fewest tokens on a device.
* ``answer-first``: the answer in its tags, then the reasons, which need not be decoded (arXiv 2406.14511).
* ``reasoning-first``: the paper's form, reasoning and then the answer in its tags.

What is written into a template has to render the same in every program that reads templates: jinja2 (transformers,
llama-cpp-python, vLLM), llama.cpp's own engine, onnxruntime-genai's. So it uses nothing but an `if`, a `set`, a list of
dictionaries and string literals, and the gate's check "template programs" holds the programs against each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from arte_edge.errors import InputError
from arte_edge.runtimes.prompt_render import Message, Templated, shows_system
from arte_edge.tasks.answers import canonical, extract
from arte_edge.tasks.task import Answer, Task

Form = Literal["answer", "answer-first", "reasoning-first"]
FORMS: tuple[Form, ...] = get_args(Form)

ANSWER_OPEN, ANSWER_CLOSE = "<ans>", "</ans>"
_RULES: dict[Form, str] = {
    "answer": "Reply with the answer alone.",
    "answer-first": f"Give the answer between {ANSWER_OPEN} and {ANSWER_CLOSE}, then the reason for it.",
    "reasoning-first": f"Think step by step, then give the final answer between {ANSWER_OPEN} and {ANSWER_CLOSE}.",
}
_LAST_TAG = re.compile(rf"\s*{ANSWER_OPEN}((?!{ANSWER_OPEN}).)*{ANSWER_CLOSE}\s*$", re.DOTALL | re.IGNORECASE)
_REASONING_TOKENS = 96  # default limit of an answer with reasoning


def tagged(answer: str) -> str:
    """Return an answer in its tags."""
    return f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


def instruction(task: Task, form: Form) -> str:
    """Return the system text of a student of `task` that answers in `form`."""
    return f"{task.description.strip()}\n{_RULES[form]}"


@dataclass(frozen=True)
class Asking:
    """How one student is asked, and how its answers are read."""

    instruction: str
    form: Form
    answer: Answer
    answer_tokens: int = _REASONING_TOKENS  # the most tokens of an answer
    stops: tuple[str, ...] = ()  # texts that end an answer; its end token does as well

    @classmethod
    def of(
        cls, task: Task, form: Form, count_tokens: Callable[[str], int], reasoning_tokens: int = _REASONING_TOKENS
    ) -> Asking:
        """Return how a student of `task` is asked; `count_tokens` counts in its tokenizer.

        The budget of an answer comes from the longest one among seed and validation examples, twice over,
        for the test split is not read; with reasoning it is at least `reasoning_tokens`.
        """
        targets = {example.target for example in (*task.seed, *task.validation)} | {*task.answer.choices}
        longest = max((count_tokens(target) for target in targets), default=16)
        tokens = (longest if task.answer.closed else 2 * longest) + 4
        if form != "answer":
            tokens = max(tokens + 8, reasoning_tokens)
        return cls(instruction(task, form), form, task.answer, tokens, _stops(form, targets))

    def messages(self, text: str, shots: Sequence[tuple[str, str]] = ()) -> list[Message]:
        """Return the conversation that asks `text`: earlier questions with their answers, and the bare text."""
        turns = [
            {"role": role, "content": content}
            for question, answer in shots
            for role, content in (("user", question), ("assistant", answer))
        ]
        return [*turns, {"role": "user", "content": text}]

    def completion(self, target: str, rationale: str = "") -> str:
        """Return the answer that a student is trained to give.

        `rationale` is the teacher's, with its answer in tags at the end; without one the answer stands alone.
        """
        reasons = _LAST_TAG.sub("", rationale.strip())
        if self.form == "answer":
            return target
        if self.form == "answer-first":
            return f"{tagged(target)} {reasons}".strip()
        return f"{reasons} {tagged(target)}".strip()

    def read(self, text: str) -> str | None:
        """Return the canonical answer in what a student wrote, None if it holds none in the task's form."""
        if self.form == "reasoning-first":
            return extract(text, self.answer)
        head, closed, _ = text.partition(ANSWER_CLOSE)
        if closed and ANSWER_OPEN in head:
            return canonical(head.rpartition(ANSWER_OPEN)[2], self.answer)
        return canonical(_until(text, self.stops), self.answer) if self.form == "answer" else None

    @property
    def answer_stops(self) -> tuple[str, ...]:
        """The texts at which an answer is complete although the student might go on: reasons need not be decoded."""
        return self.stops if self.form == "answer" else (ANSWER_CLOSE, *self.stops)

    @property
    def opening(self) -> str:
        """What comes between the prompt and a constrained answer."""
        return "" if self.form == "answer" else ANSWER_OPEN

    @property
    def closing(self) -> str:
        """What follows a constrained answer; of a bare one that is the model's end token."""
        return "" if self.form == "answer" else ANSWER_CLOSE


def _stops(form: Form, targets: Iterable[str]) -> tuple[str, ...]:
    """Return what ends an answer of a model that does not know when to: a new line, unless answers hold one."""
    return ("\n",) if form == "answer" and not any("\n" in target for target in targets) else ()


def _until(text: str, stops: Sequence[str]) -> str:
    text = text.lstrip()
    for stop in stops:
        text = text.partition(stop)[0]
    return text


class _Renders(Protocol):
    def render(self, messages: Sequence[Message]) -> str | None: ...


class _Asked(_Renders, Protocol):
    def tokenize(self, text: str) -> list[int]: ...


def held_form(model: _Renders, task: Task) -> Form | None:
    """Return the form whose instruction the model's own template gives for a bare message, None if it gives none."""
    try:
        shown = model.render([{"role": "user", "content": "?"}]) or ""
    except InputError:  # a template that renders no user message: the gate reports it
        shown = ""
    return next((form for form in FORMS if instruction(task, form) in shown), None)


def asking_of(model: _Asked, task: Task, reasoning_tokens: int = _REASONING_TOKENS) -> tuple[Asking, list[Message]]:
    """Return how `model` is asked about `task`, and the messages to put in front of a question.

    A student of the task holds its instruction in its own template: nothing has to be put in front. Any other
    model is given the instruction as a system text, and asked for the answer alone.
    """

    def count(text: str) -> int:
        return len(model.tokenize(text))

    form = held_form(model, task)
    asking = Asking.of(task, form or "answer", count, reasoning_tokens)
    return asking, [] if form else [{"role": "system", "content": asking.instruction}]


# For models without a template: text that any base model continues.
PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}"
    "{%- elif message['role'] == 'user' -%}{{- 'Question: ' + message['content'] + '\\nAnswer:\\n' -}}"
    "{%- else -%}{{- message['content'] + '\\n\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
)
_NEEDS_ESCAPE = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Two of these in a row open or close a block: no program that looks for them first must find them in a text.
_BRACES = re.compile(r"(?<=\{)(?=[{%#])|(?<=[}%#])(?=\})")


def plain_template(special_tokens: Mapping[str, str]) -> str:
    """Return `PLAIN`, with the begin token of a model that has one: programs leave it to a template to write it."""
    return "{{- bos_token -}}" * bool(special_tokens.get("bos_token")) + PLAIN


def with_instruction(template: str | None, text: str, special_tokens: Mapping[str, str]) -> str:
    """Return `template` (`PLAIN` for None) with `text` as the system text of conversations that have none.

    In a template that rejects a system text, or leaves it out, the text starts the first user turn, and so does a
    caller's own.
    """
    base = plain_template(special_tokens) if template is None else template
    probe = [{"role": "system", "content": "?"}, {"role": "user", "content": "?"}]
    literal = _literal(text)
    if shows_system(base, probe, special_tokens):
        default = f"{{%- set messages = [{{'role': 'system', 'content': {literal}}}] + messages -%}}"
        return f"{{%- if messages[0]['role'] != 'system' -%}}{default}{{%- endif -%}}{base}"
    return (
        "{%- if messages[0]['role'] == 'system' -%}"
        "{%- set messages = [{'role': 'user', 'content': messages[0]['content'] + '\\n\\n' + "
        "messages[1]['content']}] + messages[2:] -%}"
        "{%- elif messages[0]['role'] == 'user' -%}"
        f"{{%- set messages = [{{'role': 'user', 'content': {literal} + '\\n\\n' + "
        "messages[0]['content']}] + messages[1:] -%}{%- endif -%}" + base
    )


def _literal(text: str) -> str:
    """Return `text` as a string expression of a template."""
    parts = ["'" + "".join(_NEEDS_ESCAPE.get(char, char) for char in part) + "'" for part in _BRACES.split(text)]
    return parts[0] if len(parts) == 1 else f"({' + '.join(parts)})"


@dataclass(frozen=True)
class Asked:
    """A model as its tuned student will be asked: its chat template with the instruction in it."""

    chat_template: str
    special_tokens: dict[str, str]


def asked(model: Templated, text: str, *, plain: bool = False) -> Asked:
    """Return `model` with `text` as its instruction; with `plain` without its own template."""
    special = model.special_tokens
    return Asked(with_instruction(None if plain else model.chat_template, text, special), special)

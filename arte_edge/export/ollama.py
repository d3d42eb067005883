"""Ollama's Modelfile for a GGUF: the chat template as Go template, the system text, stop strings.

Ollama has no Jinja, and reads a GGUF's own template only if it resembles one that it knows. Instead of
guessing a template's family by its text, the template renders contents that can be found again, and the
pieces between them become the segments of the Go template:

    first U t0                              user alone
    system S between U t0                   system and user
    first U t0 A next V t0                  user, assistant, user

Most templates consist of such pieces and nothing else; for one that is more (tools, reasoning that is cut
out of old turns), the pieces of a plain conversation are still right, or they contradict each other and
the template is left to Ollama, with a note. For a student of a run the template also prompts as in
training: it puts ``Question:`` before the question and starts the answer.

Grammar: https://docs.ollama.com/modelfile. An instruction a line; a value in triple quotes may span lines
and ends at the next triple quotes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from arte_edge.errors import InputError
from arte_edge.export.chat import Chat
from arte_edge.runtimes.prompt_render import Message

__all__ = ["Asking", "Turns", "go_template", "modelfile", "read_turns"]

_S, _U, _A, _V = "Sysstemm", "Usserr", "Asssistantt", "Userragainn"


@dataclass(frozen=True)
class Turns:
    """The pieces. `opening` follows every question: it closes the user's turn and opens the model's."""

    first: str  # before the first user turn without a system message, a default system message included
    system: str  # before the system message
    between: str  # from the system message to the user's
    opening: str
    next: str  # from an answer to the next question

    def text(self, messages: Sequence[Message]) -> str:
        """Return the prompt for alternating `messages` as the pieces make it."""
        system, parts, asked = "", [], False
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                system = content
            elif message["role"] == "user":
                opened = f"{self.system}{system}{self.between}" if system else self.first
                parts += [self.next if asked else opened, content, self.opening]
                asked = True
            else:
                parts.append(content)
        return "".join(parts)


def read_turns(chat: Chat) -> Turns | None:
    """Return the pieces of a chat template, None if there is no template or its pieces contradict each other.

    A begin token that the tokenizer writes itself is left out: the runtime writes it too.
    """
    if chat.chat_template is None:
        return None
    user, system, answer = _message("user", _U), _message("system", _S), _message("assistant", _A)
    try:
        one = _split(chat.render([user]), _U)
        two = _split(chat.render([system, user]), _S, _U)
        many = _split(chat.render([user, answer, _message("user", _V)]), _U, _A, _V)
    except InputError:
        return None
    if one is None or two is None or many is None:
        return None
    if not one[1] == two[2] == many[1] == many[3] or many[0] != one[0]:
        return None
    bos = chat.special_tokens.get("bos_token", "") if chat.adds_bos else ""
    first, before = one[0].removeprefix(bos), two[0].removeprefix(bos)
    return Turns(first, before, two[1], one[1], many[2])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _split(text: str, *contents: str) -> list[str] | None:
    """Return what stands before, between and after `contents`; None unless each stands once, in order."""
    pieces = []
    for content in contents:
        if text.count(content) != 1:
            return None
        before, _, text = text.partition(content)
        pieces.append(before)
    return [*pieces, text]


_QUOTES = '"""'
_RAW = "{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}\n"


@dataclass(frozen=True)
class Asking:
    """How a tailored student is asked: its system message, and what stands around the bare question."""

    system: str = ""
    before: str = ""  # the question
    prefill: str = ""  # the start of the answer, written for the model
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Writer:
    lines: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.lines.append(f"# {text}")

    def say(self, instruction: str, value: str) -> None:
        self.lines.append(f"{instruction} {value}")

    def quote(self, instruction: str, value: str) -> None:
        if _QUOTES in value:
            raise InputError(
                f"Modelfile: the {instruction.lower()} holds three double quotes, which would end it",
                "Change it in the tokenizer's files or the task.",
            )
        blank = " " if value.endswith('"') else ""  # its quote would close with the first two of ours
        self.say(instruction, f"{_QUOTES}{value}{blank}{_QUOTES}")


def modelfile(
    files: list[str],
    chat: Chat,
    *,
    asking: Asking | None = None,
    plain: bool = False,
    sampling: dict[str, float] | None = None,
) -> str:
    """Return the text of a Modelfile for `files`, GGUF names beside it of which the first is used.

    Args:
        plain: the model is asked in plain text although it has a chat template.
        sampling: Ollama's parameters by name, such as temperature.

    Raises:
        InputError: the template or the system message cannot be quoted.
    """
    asking = asking or Asking()
    turns = None if plain else read_turns(chat)
    out = _Writer()
    out.note("ollama create NAME -f Modelfile && ollama run NAME")
    if len(files) > 1:
        out.note(f"Other files of the same student: {', '.join(files[1:])}")
    out.say("FROM", f"./{files[0]}")
    if asking.before or asking.prefill:
        out.note("Ask with the bare question: the template asks as in training and starts the answer.")
    if turns is not None:
        out.quote("TEMPLATE", go_template(turns, asking))
    elif chat.chat_template is None or plain:
        raw = _RAW.replace("{{ .Prompt }}", f"{_escaped(asking.before)}{{{{ .Prompt }}}}")
        out.quote("TEMPLATE", raw + _escaped(asking.prefill))
    else:
        out.note("This model's chat template is more than words around turns: Ollama reads it from the GGUF.")
    if asking.system:
        out.quote("SYSTEM", asking.system)
    for name, value in (sampling or {}).items():
        out.say("PARAMETER", f"{name} {value:g}")
    for stop in dict.fromkeys((*chat.stops, *asking.stops)):
        out.say("PARAMETER", f"stop {_one_line(stop)}")
    return "\n".join(out.lines) + "\n"


def go_template(turns: Turns, asking: Asking | None = None) -> str:
    """Return Ollama's Go template that writes what the pieces in `turns` write."""
    asking = asking or Asking()
    first, system, between = _escaped(turns.first), _escaped(turns.system), _escaped(turns.between)
    question = f"{_escaped(asking.before)}{{{{ .Content }}}}{_escaped(turns.opening + asking.prefill)}"
    return (
        '{{- $system := "" }}{{ $asked := false }}{{ range .Messages }}'
        '{{ if eq .Role "system" }}{{ $system = .Content }}'
        '{{ else if eq .Role "user" }}'
        f"{{{{ if $asked }}}}{_escaped(turns.next)}"
        f"{{{{ else if $system }}}}{system}{{{{ $system }}}}{between}"
        f"{{{{ else }}}}{first}{{{{ end }}}}"
        f"{{{{ $asked = true }}}}{question}"
        "{{ else }}{{ .Content }}{{ end }}{{ end }}"
    )


def _escaped(text: str) -> str:
    """Return `text` for a Go template, in which two braces open an action."""
    return text.replace("{{", '{{ "{{" }}')


def _one_line(text: str) -> str:
    """Return a parameter's value in quotes; Ollama unquotes it as Go does.

    Raises:
        InputError: never for the stops that we write; a control character other than a line's end.
    """
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    if not escaped.isprintable():
        raise InputError(f"Modelfile: the stop text {text!r} cannot be written", "Change the task's stops.")
    return f'"{escaped}"'

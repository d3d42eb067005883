"""Ollama's ``Modelfile`` for an exported GGUF: which file, which template, where an answer stops.

Ollama reads a GGUF's own Jinja template only if it resembles one it knows, so the
template is translated (`arte_edge.export.turns`). One that cannot be is left to Ollama,
with a word about it. For a student of a run the template also asks as in training: it
puts ``Question:`` before the question and starts the answer.

Grammar: https://docs.ollama.com/modelfile. An instruction a line; a value in triple
quotes may span lines and ends at the next triple quotes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from arte_edge.errors import InputError
from arte_edge.export.chat import Chat
from arte_edge.export.turns import Turns, read_turns

__all__ = ["Asking", "go_template", "modelfile"]

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

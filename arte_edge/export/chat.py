"""A checkpoint's chat template and special tokens, read from its files, and the Modelfile that Ollama needs of them.

Ollama has no Jinja, and uses a GGUF's own template only if it resembles a known one. So the template is
rendered with marker texts, and the segments between them make the Go template:

    first U opening                             user alone
    system S between U opening                  system and user
    first U opening A next V opening            user, assistant, user

Templates that do more (tools, reasoning removed from old turns) are either right for plain conversations, or
their segments contradict each other; then the template is left to Ollama, with a comment. A student's instruction is
the default system text of its template, and SYSTEM too, where it can be seen and edited.

Grammar: https://docs.ollama.com/modelfile. One instruction a line; a value in triple quotes may span lines
and ends at the next triple quotes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arte_edge.asking.form import Asking
from arte_edge.errors import InputError, reading
from arte_edge.files import read_json
from arte_edge.model_folder import chat_templates, end_ids, token_text, tokenizer_files
from arte_edge.runtimes.prompt_render import Message, render

_AGAIN = "Download or save the checkpoint again."
# End-of-turn tokens of known families. llama.cpp stops at these without being told, older Ollama does not.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")


@dataclass(frozen=True)
class Chat:
    """Chat template, special tokens and stop strings of a model."""

    chat_template: str | None
    special_tokens: dict[str, str] = field(default_factory=dict)
    adds_bos: bool = False  # the tokenizer adds the BOS token itself
    stops: tuple[str, ...] = ()  # texts of the tokens that end an answer

    def render(self, messages: Sequence[Message], prefill: str = "", *, plain: bool = False) -> str:
        """Return the prompt text for `messages`; with `plain` without the template.

        Raises InputError: the template does not render.
        """
        return render(self, messages, prefill, plain=plain)

    @property
    def template_sha256(self) -> str:
        """The sha256 of the template's text, empty without one."""
        return hashlib.sha256(self.chat_template.encode()).hexdigest() if self.chat_template is not None else ""


def read_chat(checkpoint: Path, adapter: Path | None = None) -> Chat:
    """Read the tokenizer files of a checkpoint, or of an adapter on it. Raises InputError: one of them is damaged."""
    files = tokenizer_files(checkpoint, adapter)

    def content(name: str) -> dict[str, Any]:
        return read_json(files[name]) if name in files else {}

    with reading(adapter or checkpoint, _AGAIN):
        config, inner = content("tokenizer_config.json"), content("tokenizer.json")
        special = content("special_tokens_map.json") | config
        tokens = {name: text for name in ("bos_token", "eos_token") if (text := token_text(special.get(name)))}
        bos = tokens.get("bos_token", "")
        adds_bos = bool(bos) and (config.get("add_bos_token") is True or _prepends(inner.get("post_processor"), bos))
        template = chat_templates(files).get("default")
        return Chat(template, tokens, adds_bos, _stops(checkpoint, inner, tokens))


def _stops(checkpoint: Path, inner: dict[str, Any], tokens: dict[str, str]) -> tuple[str, ...]:
    """Return the texts of the EOS token, of those in generation_config.json, and of known end-of-turn tokens."""
    added = {row.get("id"): token_text(row) for row in inner.get("added_tokens") or ()}
    texts = [tokens.get("eos_token", ""), *(added.get(number, "") for number in end_ids(checkpoint))]
    texts += [text for text in _END_TOKENS if text in added.values()]
    return tuple(dict.fromkeys(text for text in texts if text))


def _prepends(processor: Any, token: str) -> bool:
    """True if a post-processor of tokenizer.json puts `token` in front of every text."""
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        return any(_prepends(part, token) for part in processor.get("processors") or ())
    first = (processor.get("single") or [{}])[0]
    return isinstance(first, dict) and (first.get("SpecialToken") or {}).get("id") == token


_S, _U, _A, _V = "Sysstemm", "Usserr", "Asssistantt", "Userragainn"


@dataclass(frozen=True)
class TemplateSegments:
    """What a chat template puts around the messages."""

    first: str  # before the first user message without a system message; includes a default system message
    system: str  # before the system message
    between: str  # from the system message to the user's
    opening: str  # after every user message: closes the user's turn, opens the model's
    next: str  # from an answer to the next user message


def template_segments(chat: Chat) -> TemplateSegments | None:
    """Return the segments of a chat template, None without a template or if its segments contradict each other.

    A BOS token that the tokenizer adds is left out: the runtime adds it too.
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
    return TemplateSegments(first, before, two[1], one[1], many[2])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _split(text: str, *contents: str) -> list[str] | None:
    """Return the text before, between and after `contents`; None unless each occurs once, in order."""
    pieces = []
    for content in contents:
        if text.count(content) != 1:
            return None
        before, _, text = text.partition(content)
        pieces.append(before)
    return [*pieces, text]


_QUOTES = '"""'
_RAW = "{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}\n"


def _quoted(instruction: str, value: str) -> str:
    if _QUOTES in value:
        raise InputError(
            f"Modelfile: the {instruction.lower()} contains three double quotes, which would end it",
            "Change it in the tokenizer's files or the task.",
        )
    blank = " " if value.endswith('"') else ""  # else four quotes in a row, of which the first three close
    return f"{instruction} {_QUOTES}{value}{blank}{_QUOTES}"


def modelfile(files: list[str], chat: Chat, asking: Asking | None = None) -> str:
    """Return the text of a Modelfile for the first of `files`, names of GGUFs beside it.

    A student with an `asking` decodes greedily, as it was evaluated, and no more than its longest answer.

    Raises InputError: the template or the instruction cannot be quoted.
    """
    segments = template_segments(chat)
    lines = ["# ollama create NAME -f Modelfile && ollama run NAME"]
    if len(files) > 1:
        lines.append(f"# Other files of the same student: {', '.join(files[1:])}")
    lines.append(f"FROM ./{files[0]}")
    if segments is not None:
        lines.append(_quoted("TEMPLATE", go_template(segments)))
    elif chat.chat_template is None:
        lines.append(_quoted("TEMPLATE", _RAW))
    else:
        lines.append("# The chat template is more than fixed text around messages: Ollama reads it from the GGUF.")
    if asking:
        lines += [_quoted("SYSTEM", asking.instruction), "PARAMETER temperature 0"]
        lines.append(f"PARAMETER num_predict {asking.answer_tokens}")
    stops = dict.fromkeys((*chat.stops, *(asking.stops if asking else ())))
    lines += [f"PARAMETER stop {_one_line(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def go_template(segments: TemplateSegments) -> str:
    """Return Ollama's Go template that renders as `segments` do."""
    first, system, between = (_escaped(s) for s in (segments.first, segments.system, segments.between))
    return (
        '{{- $system := "" }}{{ $asked := false }}{{ range .Messages }}'
        '{{ if eq .Role "system" }}{{ $system = .Content }}'
        '{{ else if eq .Role "user" }}'
        f"{{{{ if $asked }}}}{_escaped(segments.next)}"
        f"{{{{ else if $system }}}}{system}{{{{ $system }}}}{between}"
        f"{{{{ else }}}}{first}{{{{ end }}}}"
        f"{{{{ $asked = true }}}}{{{{ .Content }}}}{_escaped(segments.opening)}"
        "{{ else }}{{ .Content }}{{ end }}{{ end }}"
    )


def _escaped(text: str) -> str:
    """Return `text` for a Go template, in which two braces open an action."""
    return text.replace("{{", '{{ "{{" }}')


def _one_line(text: str) -> str:
    """Return a parameter's value in quotes; Ollama unquotes it as Go does."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    if not escaped.isprintable():
        raise InputError(f"Modelfile: the stop text {text!r} cannot be written", "Change the task's stops.")
    return f'"{escaped}"'

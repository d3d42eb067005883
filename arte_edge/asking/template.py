"""Put an instruction into a chat template as its default system text.

What is written has to render the same in every program that reads templates: jinja2 (transformers, llama-cpp-python,
vLLM), llama.cpp's own engine, onnxruntime-genai's. So it uses nothing but an `if`, a `set`, a list of dictionaries and
string literals, and the gate's check "template programs" holds the programs against each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from arte_edge.runtimes.prompt_render import Templated, shows_system

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
    parts = [
        "'" + "".join(_NEEDS_ESCAPE.get(char, char) for char in part) + "'" for part in _BRACES.split(text)
    ]
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

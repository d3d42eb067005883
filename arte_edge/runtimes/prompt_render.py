"""Render messages to the one text that is hashed, sent and decoded.

A model with a chat template gets its own template, run in jinja2's sandbox (a
template is a program that came with a download). A model without one gets plain
text. A `prefill` starts the model's answer for it, which is how small models keep
to a format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import Any, NoReturn, Protocol

from arte_edge.errors import InputError

__all__ = ["CHAT_JSON", "Message", "Templated", "render"]

Message = Mapping[str, str]

CHAT_JSON = "openai-chat"  # `Engine.chat_template` of a server that renders messages itself


class Templated(Protocol):
    """What rendering needs to know of a model."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's own chat template, or None for a raw-text model."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token`` and ``eos_token`` as text, for the template."""


def render(model: Templated, messages: Sequence[Message], prefill: str = "", *, plain: bool = False) -> str:
    """Return the prompt text for `messages` (``role`` and ``content`` each), ending where the model continues.

    With `plain` the model's own template is not used.

    Raises:
        InputError: the model's chat template does not render.
    """
    template = None if plain else model.chat_template
    if template == CHAT_JSON:
        tail = [{"role": "assistant", "content": prefill}] if prefill else []
        document = {"messages": [*map(dict, messages), *tail]}
        return json.dumps(document, ensure_ascii=False, sort_keys=True)
    if template is None:
        return "\n\n".join(message["content"] for message in messages) + "\n" + prefill
    return _rendered(template, messages, model.special_tokens) + prefill


def _rendered(template: str, messages: Sequence[Message], special: Mapping[str, str]) -> str:
    from jinja2 import TemplateError

    try:
        compiled = _compiled(template)
        try:
            return _call(compiled, messages, special)
        except TemplateError:
            # Some templates (Gemma's) reject a system role: its text then starts the first user turn.
            if not messages or messages[0]["role"] != "system":
                raise
            first = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
            return _call(compiled, [first, *messages[2:]], special)
    except Exception as error:  # a template is a downloaded program: it may raise anything
        raise InputError(
            f"The model's chat template does not render: {error}",
            "Fix `chat_template` in the model's tokenizer_config.json, or pass template = 'none' for raw text.",
        ) from error


def _call(compiled: Any, messages: Sequence[Message], special: Mapping[str, str]) -> str:
    return str(compiled.render(messages=list(messages), add_generation_prompt=True, tools=None, **special))


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what an assistant wrote, for training masks; it prints what is inside."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own attribute)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    # The settings and helpers that transformers gives chat templates, which are written against them.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    # A fixed date: a prompt that changes at midnight would repeat every call.
    environment.globals["strftime_now"] = lambda form: date(2024, 7, 26).strftime(form)
    return environment.from_string(template)

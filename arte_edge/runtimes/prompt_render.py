"""Render messages to the one text that is hashed, sent and decoded.

A model with a chat template gets its own template, run in jinja2's sandbox (a template is a program that came with a
download). A model without one gets plain text. A `prefill` starts the model's answer for it, which is how small models
keep to a format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn, Protocol

from arte_edge.errors import InputError
from arte_edge.runtimes.reasoning import close_thought

Message = Mapping[str, str]


class Conversation(NamedTuple):
    """What a chat template renders."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None


FIXED_DAY = date(2024, 7, 26)  # in prompts: one that changes at midnight would repeat every call
# `Engine.chat_template` of a server that renders messages itself: one that continues an answer that was begun for the
# model, and one that closes it and opens another.
CHAT_JSON, CHAT_JSON_NEW_TURN = "openai-chat", "openai-chat, new turn"


class Templated(Protocol):
    """What rendering needs to know of a model."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's own chat template, or None for a raw-text model."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token`` and ``eos_token`` as text, for the template."""


def render(
    model: Templated, messages: Sequence[Message], prefill: str = "", *, plain: bool = False, thinking: bool = True
) -> str:
    """Return the prompt text for `messages` (``role`` and ``content`` each), ending where the model continues.

    With `plain` the model's own template is not used. Without `thinking` a template that knows how to keep the model
    from reasoning does so.

    Raises InputError: the model's chat template does not render.
    """
    template = None if plain else model.chat_template
    if template in (CHAT_JSON, CHAT_JSON_NEW_TURN):
        return _chat_document(messages, prefill, continues=template == CHAT_JSON)
    if template is None:
        return "\n\n".join(message["content"] for message in messages) + "\n" + prefill
    switches = {} if thinking else {"enable_thinking": False, "thinking": False}
    text = _rendered(template, messages, {**model.special_tokens, **switches})
    return (text if thinking else close_thought(text)) + prefill


def _chat_document(messages: Sequence[Message], prefill: str, *, continues: bool) -> str:
    """Return the document that a chat endpoint gets; a server that `continues` no answer is asked to begin with it."""
    sent, document = [*map(dict, messages)], {}
    if prefill and continues:
        sent.append({"role": "assistant", "content": prefill})
    elif prefill:
        sent[-1]["content"] += f"\n\nBegin your answer with: {prefill}"
        document["prefill"] = prefill  # not sent: where the answer is cut if it does begin so
    return json.dumps({"messages": sent, **document}, ensure_ascii=False, sort_keys=True)


def _rendered(template: str, messages: Sequence[Message], values: Mapping[str, Any]) -> str:
    try:
        if not shows_system(template, messages, values):
            messages = _merged(messages)
        return applied(template, Conversation(messages), values)
    except Exception as error:  # a template is a downloaded program: it may raise anything
        raise InputError(
            f"The model's chat template does not render: {error}",
            "Fix `chat_template` in the model's tokenizer_config.json, or pass template = 'none' for raw text.",
        ) from error


def shows_system(template: str, messages: Sequence[Message], values: Mapping[str, Any]) -> bool:
    """Return False if a template rejects a system text in front (Gemma 2) or leaves it out without a word."""
    roles = tuple(message["role"] for message in messages)
    return roles[:1] != ("system",) or _shows_system(template, roles, tuple(values.items()))


@lru_cache(maxsize=256)
def _shows_system(template: str, roles: tuple[str, ...], values: tuple[tuple[str, Any], ...]) -> bool:
    from jinja2 import TemplateError

    messages = [{"role": role, "content": f"text {i}."} for i, role in enumerate(roles)]
    try:
        return "text 0." in applied(template, Conversation(messages), dict(values))
    except TemplateError:
        return False


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose system text starts the first user turn, for templates that reject or skip that role."""
    system, rest = messages[0]["content"], list(messages[1:])
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system}, *rest]
    return [{"role": "user", "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]


def applied(template: str, what: Conversation, values: Mapping[str, Any], day: date = FIXED_DAY) -> str:
    """Return what the template itself makes of a conversation; it may raise anything.

    A `day` other than the fixed one is also given as llama.cpp gives it, as `date_string`.
    """
    known: dict[str, Any] = {"messages": list(what.messages), "tools": what.tools and list(what.tools)}
    known |= {"strftime_now": day.strftime, **values}
    if day != FIXED_DAY:
        known["date_string"] = day.strftime("%d %b %Y")
    return str(_compiled(template).render(add_generation_prompt=True, **known))


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Write JSON as transformers does for templates: jinja2's own filter escapes it for HTML and sorts the keys."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
    environment.filters["tojson"] = _tojson
    return environment.from_string(template)

"""A checkpoint's chat template and special tokens, read from its files without torch or transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arte_edge.errors import reading
from arte_edge.files import read_json
from arte_edge.runtimes.prompt_render import Message, render

__all__ = ["Chat", "read_chat"]

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
        return (
            hashlib.sha256(self.chat_template.encode()).hexdigest() if self.chat_template is not None else ""
        )


def read_chat(checkpoint: Path) -> Chat:
    """Read the tokenizer files in a checkpoint folder. Raises InputError: one of its tokenizer files is not JSON."""
    with reading(checkpoint / "tokenizer_config.json", "Save the tokenizer again, or download it again."):
        return _chat(checkpoint)


def _chat(checkpoint: Path) -> Chat:
    config = read_json(checkpoint / "tokenizer_config.json")
    special = read_json(checkpoint / "special_tokens_map.json") | config
    tokens = {name: text for name in ("bos_token", "eos_token") if (text := _text(special.get(name)))}
    inner = read_json(checkpoint / "tokenizer.json")
    bos = tokens.get("bos_token", "")
    adds_bos = bool(bos) and (
        config.get("add_bos_token") is True or _prepends(inner.get("post_processor"), bos)
    )
    template = checkpoint / "chat_template.jinja"
    own = template.read_text("utf-8") if template.is_file() else _template(config.get("chat_template"))
    return Chat(own, tokens, adds_bos, _stops(checkpoint, inner, tokens))


def _stops(checkpoint: Path, inner: dict[str, Any], tokens: dict[str, str]) -> tuple[str, ...]:
    """Return the texts of the EOS token, of those in generation_config.json, and of known end-of-turn tokens."""
    added = {row.get("id"): row.get("content", "") for row in inner.get("added_tokens") or ()}
    generation = read_json(checkpoint / "generation_config.json") or read_json(checkpoint / "config.json")
    named = generation.get("eos_token_id")
    ids = named if isinstance(named, list) else [named]
    texts = [tokens.get("eos_token", ""), *(added.get(number, "") for number in ids)]
    texts += [text for text in _END_TOKENS if text in added.values()]
    return tuple(dict.fromkeys(text for text in texts if text))


def _template(value: Any) -> str | None:
    """Return the default template of a tokenizer_config.json: one text, or one of several by name."""
    if isinstance(value, list):
        by_name = {row.get("name"): row.get("template") for row in value if isinstance(row, dict)}
        value = by_name.get("default")
    return value if isinstance(value, str) and value else None


def _text(token: Any) -> str:
    """Return a special token's text, stored as a string or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _prepends(processor: Any, token: str) -> bool:
    """True if a post-processor of tokenizer.json puts `token` in front of every text."""
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        return any(_prepends(part, token) for part in processor.get("processors") or ())
    first = (processor.get("single") or [{}])[0]
    return isinstance(first, dict) and (first.get("SpecialToken") or {}).get("id") == token

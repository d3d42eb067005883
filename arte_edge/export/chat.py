"""A checkpoint's chat template and special tokens, read from its files without torch or transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arte_edge.errors import reading
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
        return (
            hashlib.sha256(self.chat_template.encode()).hexdigest() if self.chat_template is not None else ""
        )


def read_chat(checkpoint: Path, adapter: Path | None = None) -> Chat:
    """Read the tokenizer files of a checkpoint, or of an adapter on it. Raises InputError: one of them is damaged."""
    files = tokenizer_files(checkpoint, adapter)

    def content(name: str) -> dict[str, Any]:
        return read_json(files[name]) if name in files else {}

    with reading(adapter or checkpoint, _AGAIN):
        config, inner = content("tokenizer_config.json"), content("tokenizer.json")
        special = content("special_tokens_map.json") | config
        tokens = {
            name: text for name in ("bos_token", "eos_token") if (text := token_text(special.get(name)))
        }
        bos = tokens.get("bos_token", "")
        adds_bos = bool(bos) and (
            config.get("add_bos_token") is True or _prepends(inner.get("post_processor"), bos)
        )
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

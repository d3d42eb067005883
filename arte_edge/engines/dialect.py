"""How OpenAI-compatible servers differ, as far as it changes the text they write.

Servers fill in what a request leaves open from defaults of their own: llama-cpp-python
draws from 40 tokens with a repeat penalty of 1.1, vLLM takes a model's
generation_config. A distribution that depends on the server is not the model's, so
servers that name themselves in their model list get these switched off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Dialect", "dialect_of"]


@dataclass(frozen=True)
class Dialect:
    """What one kind of server takes and offers beyond the common ground."""

    name: str
    extra: Mapping[str, Any] = field(default_factory=dict)  # added to every request
    prefill: Mapping[str, Any] = field(default_factory=dict)  # added when the last message is the model's
    max_tokens: str = "max_tokens"  # the key's name in chat requests
    most_stops: int = 1000  # stop strings in one request
    candidates: int = 20  # the most next tokens that it gives log-probabilities of
    keeps_stops: bool = False  # `extra` makes it leave stop strings in the text
    grammar: bool = False  # takes GBNF
    tokenize: tuple[str, str, str] | None = None  # path, key of the text, key of the count or the tokens


_LLAMA_EXTRA = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}

_VLLM = Dialect(
    "vllm",
    extra={"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "include_stop_str_in_output": True},
    prefill={"continue_final_message": True, "add_generation_prompt": False},
    keeps_stops=True,
    tokenize=("/tokenize", "prompt", "count"),
)
_LLAMA_SERVER = Dialect(
    "llama-server",
    extra=_LLAMA_EXTRA,
    candidates=5000,
    grammar=True,
    tokenize=("/tokenize", "content", "tokens"),
)
_LLAMA_CPP_PYTHON = Dialect(
    "llama-cpp-python",
    extra=_LLAMA_EXTRA,
    candidates=5000,
    grammar=True,
    tokenize=("/extras/tokenize/count", "input", "count"),
)
_OPENAI = Dialect("openai", max_tokens="max_completion_tokens", most_stops=4, candidates=5)
_PLAIN = Dialect("openai-compatible")

# `owned_by` in the server's model list -> what it is
_OWNERS = {"vllm": _VLLM, "llamacpp": _LLAMA_SERVER, "me": _LLAMA_CPP_PYTHON}


def dialect_of(host: str, owned_by: str) -> Dialect:
    """Return the dialect of the server at `host` whose model list says `owned_by`."""
    if host == "api.openai.com":
        return _OPENAI
    return _OWNERS.get(owned_by, _PLAIN)

"""What the clock asks of a model, whatever runs it: read tokens, write one more.

A runtime behind this protocol does no sampling and no detokenizing while it is timed, as in
llama-bench, and nothing else either: what is measured is the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["RuntimeFacts", "SpeedModel"]


@dataclass(frozen=True)
class RuntimeFacts:
    """What runs the model and how; goes into `SpeedRow` as it is."""

    runtime: str
    build_commit: str = ""
    build: str = ""
    n_batch: int = 0
    n_ubatch: int = 0
    type_k: str = ""
    type_v: str = ""
    flash_attn: bool | None = None
    use_mmap: bool | None = None
    bos: int | None = None  # the token that the model wants in front of every text
    notes: tuple[str, ...] = field(default=())


class SpeedModel(Protocol):
    """An open model with one empty cache of `context_tokens` tokens."""

    @property
    def facts(self) -> RuntimeFacts: ...

    @property
    def n_vocab(self) -> int: ...

    @property
    def context_tokens(self) -> int: ...

    def clear(self) -> None:
        """Empty the cache."""

    def read(self, tokens: Sequence[int]) -> int:
        """Append `tokens` to the cache (prefill); return the most likely next token, its logits computed."""

    def step(self, token: int) -> object:
        """Append one token to the cache (decode), the next logits computed; what it returns is not looked at."""

    def close(self) -> None: ...

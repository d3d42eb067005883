"""A model that does nothing, or sleeps a given time: what remains is the cost of the benchmark itself.

Its name is ``null``, or ``null:MS`` for one that takes MS milliseconds a token.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from arte_edge.runtimes.protocol import RuntimeFacts

_NAME = re.compile(r"null(?::(\d{1,6}(?:\.\d+)?))?")


def null_ms(path: Path) -> float | None:
    """Return the milliseconds a token that the name of a null model gives, None if it is no such name."""
    found = _NAME.fullmatch(str(path))
    return None if found is None else float(found[1] or 0)


class NullDecoder:
    """`Decoder` without a model."""

    facts = RuntimeFacts(runtime="null")
    n_vocab = 32_000

    def __init__(self, context_tokens: int, token_ms: float = 0.0) -> None:
        self.context_tokens = context_tokens
        self._token_s = token_ms / 1e3

    def clear(self) -> None:
        """Nothing to empty."""

    def prefill(self, tokens: Sequence[int]) -> int:
        if self._token_s:
            time.sleep(self._token_s * len(tokens))
        return 0

    def step(self, token: int) -> None:
        if self._token_s:
            time.sleep(self._token_s)

    def close(self) -> None:
        """Nothing to free."""

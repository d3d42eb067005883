"""Draw the next token from logits: greedy, or sampled with the request's own generator.

Each request owns a generator seeded from its prompt, seed and sample number, so a
draw does not depend on who shares the batch or in which order requests arrive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from arte_edge.runtimes.completion import Request, Sampling

__all__ = ["draw", "in_loop", "request_rng"]

# Tokens less likely than e^-25 of the best one are never drawn; sorting 150,000 of them costs more than decoding.
_TAIL_NATS = 25.0
_NUCLEUS = 512  # tokens that are sorted first


def request_rng(request: Request, sampling: Sampling) -> np.random.Generator:
    """Return the generator of one request."""
    name = f"{sampling.seed}\x00{request.sample}\x00{request.prompt}"
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def draw(logits: NDArray[np.float32], sampling: Sampling, rng: np.random.Generator) -> int:
    """Return the next token id from `logits` ``[v]``."""
    if sampling.temperature <= 0.0:
        return int(logits.argmax())
    scaled = logits / sampling.temperature
    likely = np.flatnonzero(scaled > scaled.max() - _TAIL_NATS)
    weight = np.exp((scaled[likely] - scaled.max()).astype(np.float64))
    if sampling.top_p < 1.0:
        order = _nucleus(weight, sampling.top_p)
        likely, weight = likely[order], weight[order]
    cumulative = np.cumsum(weight)
    return int(likely[np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")])


def _nucleus(weight: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Return the indices of the largest weights ``[v]`` that make up `top_p` of all, the largest first.

    Only so many as a confident model needs are sorted, unless they are too few.
    """
    total, n = weight.sum(), len(weight)
    for most in (_NUCLEUS, n):
        some = (
            np.arange(n) if most >= n else np.flatnonzero(weight > np.partition(weight, n - most)[n - most])
        )
        order = some[np.argsort(-weight[some], kind="stable")]
        mass = np.cumsum(weight[order]) / total
        end = int(np.searchsorted(mass, top_p)) + 1
        if end <= len(order) or len(order) == n:
            break
    return order[:end]


def in_loop(tokens: Sequence[int], longest: int = 32, times: int = 4) -> bool:
    """Return whether the last tokens are one phrase of at most `longest` tokens repeated `times` times.

    A phrase must fill at least 24 tokens in all: "no, no, no, no" is still a text.
    """
    for period in range(1, longest + 1):
        need = max(period * times, 24 - 24 % period + period)
        if len(tokens) >= need:
            tail = tokens[-need:]
            if tail[period:] == tail[:-period]:
                return True
    return False

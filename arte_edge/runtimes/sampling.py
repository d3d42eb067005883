"""Draw the next token from logits: greedy, or sampled with the request's own generator.

Each request owns a generator seeded from its prompt, seed and sample number, so a
draw does not depend on who shares the batch or in which order requests arrive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from arte_edge.runtimes.completion import Request, Sampling

# Tokens less likely than e^-25 of the best one are never drawn; sorting 150,000 of them costs more than decoding.
_TAIL_NATS = 25.0


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


class Constraint(Protocol):
    """What may follow in one text, for example a grammar."""

    def mask(self, tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `logits` with -inf where a token is forbidden."""

    def accept(self, token: int) -> None:
        """Note that `token` was written."""


def draw_allowed(
    logits: NDArray[np.float32], sampling: Sampling, rng: np.random.Generator, allowed: Constraint
) -> int:
    """Return the next token id from logits ``[v]``, one that is `allowed`, which then knows of it."""
    # Most draws are allowed already; masking the whole vocabulary is the slow path.
    token = draw(logits, sampling, rng)
    one = np.array([token])
    if not np.isfinite(allowed.mask(one, logits[one])[0]):
        every = np.arange(len(logits))
        token = draw(allowed.mask(every, logits), sampling, rng)
    allowed.accept(token)
    return token


def _nucleus(weight: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Return the indices of the largest weights ``[v]`` that make up `top_p` of all, the largest first.

    The tokens that are each less likely than ``(1 - top_p) / v`` are together less likely than ``1 - top_p``, so none
    of them belongs to it: only the others are sorted.
    """
    total = weight.sum()
    some = np.flatnonzero(weight >= 0.5 * (1 - top_p) * total / len(weight))  # half: room for rounding
    order = some[np.argsort(-weight[some], kind="stable")]
    mass = np.cumsum(weight[order]) / total
    return order[: int(np.searchsorted(mass, top_p)) + 1]


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

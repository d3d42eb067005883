"""Draw the next token from logits: greedy, or sampled with the request's own generator.

Each request owns a generator seeded from its prompt, seed and sample number, so a
draw does not depend on who shares the batch or in which order requests arrive.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from arte_edge.runtimes.completion import Request, Sampling

# Tokens less likely than e^-25 of the best one are never drawn; sorting 150,000 of them costs more than decoding.
_TAIL_NATS = 25.0
# Of `Repeats`; the first two are what DRY's author recommends.
_FREE = 2  # tokens that may be a phrase of before; the next one is penalised
_BASE = 1.75  # by how much the penalty grows with each token that the phrase is longer
_LONGEST_PHRASE = 30  # tokens, from which on it does not grow
_LOOP_EVERY = 16  # tokens between two checks for a loop
_COMMON = 3  # times that a phrase is in a prompt from which it is part of the form


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


class Repeats:
    """Makes a token less likely that would go on with a phrase of the prompt or of the text.

    That is DRY sampling ("don't repeat yourself", github.com/oobabooga/text-generation-webui/pull/5677), within lines,
    and without a penalty for what a prompt says `_COMMON` times: its examples share that.
    """

    def __init__(self, prompt: Sequence[int], nats: float, ends_line: Callable[[int], bool]) -> None:
        """`nats` are the penalty of the first token after `_FREE` repeated ones; `ends_line` of a token."""
        self._nats, self._ends_line = nats, ends_line
        self._tokens: list[int] = []
        self._ends: list[bool] = []
        # Where what followed a phrase is, by the phrase's last tokens
        self._places: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self._n_prompt = len(prompt)
        for token in prompt:
            self.push(token)

    def push(self, token: int) -> None:
        """Note the next token."""
        at, ends = len(self._tokens), self._ends_line(token)
        if at >= _FREE and not ends and not any(self._ends[-_FREE:]):
            self._places[tuple(self._tokens[-_FREE:])].append(at)
        self._tokens.append(token)
        self._ends.append(ends)

    def lessened(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits ``[v]`` of the next token with the penalties."""
        places = self._places.get(tuple(self._tokens[-_FREE:]), ())
        said = Counter(self._tokens[at] for at in places if at < self._n_prompt)
        penalty: dict[int, float] = {}
        for at in places:
            token = self._tokens[at]
            if said[token] < _COMMON:
                nats = self._nats * _BASE ** (self._length(at) - _FREE)
                penalty[token] = max(nats, penalty.get(token, 0.0))
        if not penalty:
            return logits
        logits = logits.copy()
        logits[list(penalty)] -= np.array(list(penalty.values()), dtype=np.float32)
        return logits

    def _length(self, at: int) -> int:
        """Return how many of the last tokens of all are also those before `at`, on one line."""
        n, end = 0, len(self._tokens)
        while (
            n < min(at, _LONGEST_PHRASE)
            and self._tokens[at - 1 - n] == self._tokens[end - 1 - n]
            and not self._ends[at - 1 - n]
        ):
            n += 1
        return n


class Constraint(Protocol):
    """What may follow in one text, for example a grammar."""

    def mask(self, tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `logits` with -inf where a token is forbidden."""

    def accept(self, token: int) -> None:
        """Note that `token` was written."""

    def close(self) -> None:
        """Free it: the text is finished."""


def draw_allowed(logits: NDArray[np.float32], sampling: Sampling, rng: np.random.Generator, allowed: Constraint) -> int:
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


class Drawing:
    """Draws the tokens of one text until a budget or a loop ends it; subclasses know stop strings and end tokens."""

    def __init__(
        self,
        request: Request,
        prompt: Sequence[int],
        sampling: Sampling,
        ends_line: Callable[[int], bool],
        grammar: Constraint | None,
    ) -> None:
        self._sampling, self._rng, self._grammar = sampling, request_rng(request, sampling), grammar
        nats = sampling.repeat_penalty
        self._repeats = Repeats(prompt, nats, ends_line) if nats else None
        self._written: list[int] = []

    def draw(self, logits: NDArray[np.float32]) -> int:
        """Return the next token id from logits ``[v]``."""
        if self._repeats is not None:
            logits = self._repeats.lessened(logits)
        if self._grammar is None:
            return draw(logits, self._sampling, self._rng)
        return draw_allowed(logits, self._sampling, self._rng, self._grammar)

    def append(self, token: int) -> None:
        """Append the next token."""
        self._written.append(token)
        if self._repeats is not None:
            self._repeats.push(token)

    def reason_to_end(self) -> str:
        """Return ``length`` or ``loop`` if the text ends with the token that was appended last, else nothing."""
        if len(self._written) >= self._sampling.max_tokens:
            return "length"
        return "loop" if len(self._written) % _LOOP_EVERY == 0 and in_loop(self._written) else ""

    def close(self) -> None:
        """Free the grammar: the text is finished."""
        if self._grammar is not None:
            self._grammar.close()


def in_loop(tokens: Sequence[int]) -> bool:
    """Return whether the last tokens are one phrase of at most 32 tokens repeated four times.

    A phrase must fill at least 24 tokens in all: "no, no, no, no" is still a text.
    """
    for period in range(1, 33):
        need = max(4 * period, 24 - 24 % period + period)
        if len(tokens) >= need:
            tail = tokens[-need:]
            if tail[period:] == tail[:-period]:
                return True
    return False

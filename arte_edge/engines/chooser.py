"""Several continuations of one prompt as work for an engine: which rows to decode, and what to add up.

The tokens that count are those of `choices.spans`. A context that several choices share is decoded,
and read, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from arte_edge.engines.choices import spans
from arte_edge.engines.llama_batch import Job
from arte_edge.engines.sampling import log_softmax_at
from arte_edge.engines.tree import Context, Tree, longest_ways

__all__ = ["Chooser"]


class Chooser:
    """Log-probabilities of the `choices` after one prompt; run its `trees` or its `jobs` first."""

    def __init__(self, tokenize: Callable[[str], list[int]], prompt: str, choices: Sequence[str]) -> None:
        lists = [tokenize(prompt + choice) for choice in choices]
        # What to add up for each choice: (tokens before, next token) pairs.
        self._terms = [
            [(tuple(tokens[:i]), tokens[i]) for i in range(start, end)]
            for tokens, (start, end) in zip(lists, spans(lists, tokenize(prompt)), strict=True)
        ]
        self._next: dict[Context, set[int]] = {}  # tokens before -> the tokens that may follow
        for before, token in (term for terms in self._terms for term in terms):
            self._next.setdefault(before, set()).add(token)
        self._score: dict[Context, dict[int, float]] = {}
        self._ways = longest_ways(self._next)  # the others get their logits on the way

    @property
    def has_prompt(self) -> bool:
        """Return whether something stands before every token that counts."""
        return () not in self._next

    @property
    def longest(self) -> int:
        """Tokens of the longest context, and the one after it."""
        return max((len(way) + 1 for way in self._ways), default=0)

    def trees(self, most_leaves: int) -> list[Tree]:
        """Return the ways as trees of at most `most_leaves`; nearly always one."""
        parts = [self._ways[i : i + most_leaves] for i in range(0, len(self._ways), most_leaves)]
        return [Tree(part, {context: [self._note] for context in self._wanted(part)}) for part in parts]

    def jobs(self) -> list[Job]:
        """Return a job for each way on its own, for models that cannot share a token between sequences."""
        return [self._job(way) for way in self._ways]

    def _job(self, way: Context) -> Job:
        wanted = frozenset(len(context) - 1 for context in self._wanted([way]))
        return Job(list(way), wanted, lambda at, logits: self._note(way[: at + 1], logits))

    def _wanted(self, ways: Sequence[Context]) -> set[Context]:
        """Return the contexts that are on one of `ways`."""
        return {context for context in self._next if any(way[: len(context)] == context for way in ways)}

    def _note(self, context: Context, logits: NDArray[np.float32]) -> None:
        ids = sorted(self._next[context])
        self._score[context] = dict(zip(ids, log_softmax_at(logits, ids).tolist(), strict=True))

    def log_probabilities(self) -> NDArray[np.float64]:
        """Return them ``[n_choice]``."""
        return np.array([sum(self._score[before][token] for before, token in terms) for terms in self._terms])

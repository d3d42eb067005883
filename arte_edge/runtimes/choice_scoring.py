"""Log-probabilities of several continuations of one prompt: which tokens count, and what has to be decoded for them.

Choices are tokenized together with the prompt, so that a token that spans the boundary is the one the model
would write. The tokens of a choice that count run from where the choices diverge to where the choice is unique:
what comes before is the same for all, and what follows is not compared with anything ("(A)" against "(B)" is "A"
against "B"). The probabilities of a closed set therefore never add up to more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from arte_edge.runtimes.llamacpp.scheduler import Job
from arte_edge.runtimes.prefix_tree import Context, Tree, longest_ways
from arte_edge.runtimes.sampling import log_softmax_at

__all__ = ["Chooser", "spans"]

Token = TypeVar("Token", int, str)


def spans(lists: Sequence[Sequence[Token]], prompt: Sequence[Token]) -> list[tuple[int, int]]:
    """Return for each token list (prompt and choice) the range ``start, end`` that counts.

    With one choice there is nothing to part from: all tokens after `prompt` count.
    """
    start = _parting([lists[0], prompt] if len(lists) == 1 else lists)
    return [(start, _alone(tokens, lists, start)) for tokens in lists]


def _parting(lists: Sequence[Sequence[Token]]) -> int:
    shortest = min(len(tokens) for tokens in lists)
    return next((i for i in range(shortest) if len({tokens[i] for tokens in lists}) > 1), shortest)


def _alone(tokens: Sequence[Token], lists: Sequence[Sequence[Token]], start: int) -> int:
    if len(lists) > 1:
        for end in range(start + 1, len(tokens)):
            if sum(list(other[:end]) == list(tokens[:end]) for other in lists) == 1:
                return end
    return len(tokens)


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

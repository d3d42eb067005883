"""Which scores to measure next, when only the order of the best and the worst is wanted.

Alignment needs each question's best and worst rationale, and the top and bottom quarter of the
questions; not every score to the last digit. So the preference set is measured in rounds: every
draft on its first questions (a few drafts on all of them, to learn which questions go together), then
more questions for those drafts alone whose place is still open, each time the ones that tell most.

A draft's place is *open* while the probability that the full grid would put another draft ahead by
more than a tie exceeds `error`: elimination as in best-arm identification (Audibert, Bubeck and
Munos 2010), at both ends of every question at once, on the paired differences of a model of the grid
(`belief`). The state is the matrix of what was measured, and the same matrix gives the same next
round, so that a killed race goes on to the same end.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from arte_edge.distill.belief import Belief, Floats, believe

__all__ = ["Ask", "Race", "spread_answers"]

_normal = NormalDist()


@dataclass(frozen=True)
class Ask:
    """Measure `draft` on the questions `items` of the preference set."""

    draft: int
    items: tuple[int, ...]


@dataclass(frozen=True)
class Race:
    """Rules of one race over `n_item` questions; `question` ``[d]`` says whose rationale each draft is.

    `share` of the full grid is the most that is spent, `error` the risk at which a place counts as decided.
    """

    question: tuple[int, ...]
    n_item: int
    share: float = 0.25
    error: float = 0.05

    @property
    def first(self) -> int:
        """Questions that every draft gets at first."""
        return min(self.n_item, max(3, round(0.4 * self.share * self.n_item)))

    @property
    def pilots(self) -> list[int]:
        """Drafts that are measured on all questions at first: evenly spread, a twentieth of all."""
        d = len(self.question)
        n = max(1, round(0.2 * self.share * d))
        return sorted({(2 * i + 1) * d // (2 * n) for i in range(n)})

    @property
    def block(self) -> int:
        """Questions that a draft gets more in a later round."""
        return max(2, self.first // 2)

    @property
    def budget(self) -> int:
        """Cells that may be measured at most."""
        d = len(self.question)
        return max(int(self.share * d * self.n_item), d * self.first)

    def ask(self, values: Floats) -> list[Ask]:
        """Return the next round for the grid ``[d, k]`` measured so far (NaN: not yet); empty at the end."""
        known = np.isfinite(values)
        if not known.any():
            pilots = set(self.pilots)
            every = tuple(range(self.n_item))
            return [
                Ask(draft, every if draft in pilots else every[: self.first])
                for draft in range(len(self.question))
            ]
        left = self.budget - int(known.sum())
        belief = believe(values)
        risk = self.risk(belief)
        unfinished = ~known.all(axis=1)
        # The widest open first; ties by place, so that the order is the same on every machine.
        order = sorted(
            np.flatnonzero((risk > self.error) & unfinished), key=lambda draft: (-risk[draft], draft)
        )
        # A round spends a third of what is left, or the first guess would decide over everything.
        spend = max(left // 3, min(left, self.block * 4))
        asks = []
        for draft in order:
            n = min(self.block, int((~known[draft]).sum()), spend)
            if n < 1:
                break
            asks.append(Ask(int(draft), tuple(belief.next_items(known[draft], n))))
            spend -= n
        return asks

    def risk(self, belief: Belief) -> Floats:
        """Return ``[d]``: how likely it is that a draft's place is wrong by more than a tie."""
        risk = np.zeros(len(self.question))
        for drafts in self._groups():
            for sign in (1.0, -1.0):  # the best, then the worst
                leader = max(drafts, key=lambda draft: (sign * belief.mean[draft], -draft))
                for other in drafts:
                    if other != leader:
                        behind = sign * (belief.mean[leader] - belief.mean[other]) + belief.tie
                        p = _above(-behind, float(belief.variance[leader] + belief.variance[other]))
                        risk[[leader, other]] = np.maximum(risk[[leader, other]], p)
        return risk

    def _groups(self) -> Iterable[list[int]]:
        groups: dict[int, list[int]] = defaultdict(list)
        for draft, key in enumerate(self.question):
            groups[key].append(draft)
        return groups.values()


def spread_answers(answers: Sequence[str]) -> list[int]:
    """Return an order of questions in which every beginning holds each answer about as often as the others.

    The order of `answers` is kept within one answer: the most discriminating first.
    """
    seen: dict[str, int] = defaultdict(int)
    keys = []
    for place, answer in enumerate(answers):
        keys.append((seen[answer], place))
        seen[answer] += 1
    return sorted(range(len(answers)), key=lambda place: keys[place])


def _above(gap: float, variance: float) -> float:
    """Return the probability that a normal variable of mean `gap` is above 0."""
    if variance <= 0:
        return 1.0 if gap > 0 else 0.0
    return _normal.cdf(gap / math.sqrt(variance))

"""Adaptive scoring: measure only the scores that the ranking of the best and the worst needs.

docs/preference-scores.md describes the procedure. The rank of a draft is *open* while the probability that the full
grid would rank another draft ahead by more than a tie exceeds `error`: elimination as in best-arm identification
(Audibert, Bubeck and Munos 2010), at both ends of every question at once, on the paired differences of a Gaussian
model of the grid. The state is the matrix of measured cells, and the same matrix gives the same next round, so a
killed run resumes to the same result.

The model: a row of the grid is one draft, a column one question of the preference set. Rows are draws of one normal
distribution over the columns, estimated from whatever cells are there by EM (Dempster, Laird and Rubin 1977, section
4.1.3), the covariance shrunk towards one variance and one correlation (Ledoit and Wolf 2004), since drafts are few.

Notation: d drafts, k questions; NaN marks a cell that was not measured.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_EM_STEPS = 15
_JITTER = 1e-9
_normal = NormalDist()


@dataclass(frozen=True)
class Cells:
    """Cells to measure: `draft` on the questions `items` of the preference set."""

    draft: int
    items: tuple[int, ...]


@dataclass(frozen=True)
class AdaptivePlan:
    """The rules for one grid of `n_item` questions; `question` ``[d]`` says whose rationale each draft is.

    At most `share` of the full grid is measured; `error` is the risk at which a rank counts as decided.
    """

    question: tuple[Hashable, ...]
    n_item: int
    share: float = 0.25
    error: float = 0.05

    @property
    def first(self) -> int:
        """Questions of every draft in the first round."""
        return min(self.n_item, max(3, round(0.4 * self.share * self.n_item)))

    @property
    def pilots(self) -> list[int]:
        """Drafts that are measured on all questions in the first round: evenly spread, a twentieth of all."""
        d = len(self.question)
        n = max(1, round(0.2 * self.share * d))
        return sorted({(2 * i + 1) * d // (2 * n) for i in range(n)})

    @property
    def block(self) -> int:
        """Additional questions of a draft in a later round."""
        return max(2, self.first // 2)

    @property
    def budget(self) -> int:
        """Number of cells after which no further round is measured."""
        d = len(self.question)
        return max(int(self.share * d * self.n_item), d * self.first)

    @property
    def most(self) -> int:
        """Maximum number of cells that are measured: the first round is never cut short."""
        d = len(self.question)
        return max(self.budget, d * self.first + len(self.pilots) * (self.n_item - self.first))

    def next_round(self, values: Floats) -> list[Cells]:
        """Return the next round for the grid ``[d, k]`` measured so far (NaN: not yet); empty at the end."""
        known = np.isfinite(values)
        if not known.any():
            pilots = set(self.pilots)
            every = tuple(range(self.n_item))
            return [
                Cells(draft, every if draft in pilots else every[: self.first]) for draft in range(len(self.question))
            ]
        left = self.budget - int(known.sum())
        model = fit_score_model(values)
        risk = self.risk(model)
        unfinished = ~known.all(axis=1)
        # The highest risk first; ties by position, so that the order is the same on every machine.
        order = sorted(np.flatnonzero((risk > self.error) & unfinished), key=lambda draft: (-risk[draft], draft))
        # A round spends a third of what is left: the first estimate must not decide everything.
        spend = max(left // 3, min(left, self.block * 4))
        cells = []
        for draft in order:
            n = min(self.block, int((~known[draft]).sum()), spend)
            if n < 1:
                break
            cells.append(Cells(int(draft), tuple(model.next_items(known[draft], n))))
            spend -= n
        return cells

    def risk(self, model: ScoreModel) -> Floats:
        """Return ``[d]``: the probability that the rank of a draft is wrong by more than a tie."""
        risk, tie = np.zeros(len(self.question)), model.tie
        for drafts in self._groups():
            for sign in (1.0, -1.0):  # the best, then the worst
                leader = max(drafts, key=lambda draft: (sign * model.mean[draft], -draft))
                for other in drafts:
                    if other != leader:
                        behind = sign * (model.mean[leader] - model.mean[other]) + tie
                        p = _above(-behind, float(model.variance[leader] + model.variance[other]))
                        risk[[leader, other]] = np.maximum(risk[[leader, other]], p)
        return risk

    def _groups(self) -> Iterable[list[int]]:
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for draft, key in enumerate(self.question):
            groups[key].append(draft)
        return groups.values()


def interleave_answers(answers: Sequence[str]) -> list[int]:
    """Return an order of questions of which every prefix holds each answer about equally often.

    Within one answer the order of `answers` stays: the most discriminating first.
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


@dataclass(frozen=True)
class ScoreModel:
    """The Gaussian model of a grid and its estimate of each draft's mean over all k questions.

    `mean` and `variance` are ``[d]``: a draft that was measured on all questions has variance 0.
    `covariance` is ``[k, k]``.
    """

    mean: Floats
    variance: Floats
    covariance: Floats

    @property
    def tie(self) -> float:
        """Standard error of the difference of two drafts on the full grid: closer than this is a tie."""
        k = len(self.covariance)
        within = np.trace(self.covariance) / k - self.covariance.mean()
        return float(np.sqrt(2 * max(within, 0.0) / k))

    def next_items(self, measured: NDArray[np.bool_], n: int) -> list[int]:
        """Return the `n` most informative questions about a draft's mean besides those `measured` ``[k]``.

        Greedy: each removes the largest part of the remaining variance.
        """
        rest = self.covariance + _JITTER * np.eye(len(self.covariance))
        for known in np.flatnonzero(measured):
            rest = _given(rest, int(known))
        open_, chosen = ~measured, []
        for _ in range(min(n, int(open_.sum()))):
            gain = np.where(open_, rest.sum(axis=0) ** 2 / np.maximum(np.diag(rest), _JITTER), -1.0)
            item = int(np.argmax(gain))
            chosen.append(item)
            open_[item] = False
            rest = _given(rest, item)
        return sorted(chosen)


def _given(covariance: Floats, item: int) -> Floats:
    """Return the covariance ``[k, k]`` conditional on `item`."""
    column = covariance[:, item]
    return np.asarray(covariance - np.outer(column, column) / max(column[item], _JITTER))


def fit_score_model(values: Floats) -> ScoreModel:
    """Fit the model to a grid ``[d, k]`` in which every row and every column has a measured cell."""
    known = np.isfinite(values)
    d, k = values.shape
    mu = np.where(known, values, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    spread = np.where(known, values - mu, 0.0)
    variance = float((spread**2).sum() / max(known.sum(), 1)) or _JITTER
    sigma = variance * 0.5 * (np.eye(k) + np.ones((k, k)))
    patterns: dict[bytes, list[int]] = defaultdict(list)
    for row in range(d):
        patterns[known[row].tobytes()].append(row)
    filled, left = values.copy(), np.zeros(d)
    for _ in range(_EM_STEPS):
        extra = np.zeros((k, k))
        for drafts in patterns.values():
            rows = np.array(drafts)
            seen = known[rows[0]]
            if seen.all():
                continue
            inside = sigma[np.ix_(seen, seen)] + _JITTER * np.eye(int(seen.sum()))
            weights = np.linalg.solve(inside, sigma[np.ix_(seen, ~seen)])  # [n_seen, n_missing]
            filled[np.ix_(rows, np.flatnonzero(~seen))] = mu[~seen] + (values[rows][:, seen] - mu[seen]) @ weights
            rest = sigma[np.ix_(~seen, ~seen)] - sigma[np.ix_(~seen, seen)] @ weights
            extra[np.ix_(~seen, ~seen)] += len(rows) * rest
            left[rows] = max(float(rest.sum()), 0.0) / k**2
        mu = filled.mean(axis=0)
        centred = filled - mu
        sigma = _shrunk((centred.T @ centred + extra) / d, d)
    return ScoreModel(filled.mean(axis=1), left, sigma)


def _shrunk(sample: Floats, d: int) -> Floats:
    """Shrink a sample covariance ``[k, k]`` towards one variance and one covariance, the more the fewer drafts."""
    k = len(sample)
    variance = float(np.trace(sample)) / k
    shared = float(sample.sum() - np.trace(sample)) / max(k * (k - 1), 1)
    shared = min(max(shared, 0.0), 0.98 * variance)
    target = shared * np.ones((k, k)) + (variance - shared) * np.eye(k)
    weight = k / 2  # equivalent to so many drafts that look like the target
    return np.asarray((d * sample + weight * target) / (d + weight))

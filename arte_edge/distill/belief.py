"""What the measured part of a score grid says about the whole of it.

A row of the grid is one draft, a column one question of the preference set. Rows are taken for
draws of one normal distribution over the columns: questions that rise and fall together need not
all be asked. Mean and covariance are estimated from whatever cells are there by EM (Dempster, Laird
and Rubin 1977, section 4.1.3), the covariance shrunk towards one variance and one correlation (Ledoit and
Wolf 2004, "Honey, I shrunk the sample covariance matrix"), since drafts are few.

Notation: d drafts, k questions; NaN marks a cell that was not measured.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Belief", "believe"]

Floats = NDArray[np.float64]
_ROUNDS = 15
_JITTER = 1e-9


@dataclass(frozen=True)
class Belief:
    """The normal model of a grid and what it says of each draft's mean over all k questions.

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
        """Return the `n` questions that tell most about a draft's mean beside those `measured` ``[k]``.

        Greedy: each takes the largest part of the variance that the ones before it leave.
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
    """Return the covariance ``[k, k]`` that is left once `item` is known."""
    column = covariance[:, item]
    return np.asarray(covariance - np.outer(column, column) / max(column[item], _JITTER))


def believe(values: Floats) -> Belief:
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
    for _ in range(_ROUNDS):
        extra = np.zeros((k, k))
        for drafts in patterns.values():
            rows = np.array(drafts)
            seen = known[rows[0]]
            if seen.all():
                continue
            inside = sigma[np.ix_(seen, seen)] + _JITTER * np.eye(int(seen.sum()))
            weights = np.linalg.solve(inside, sigma[np.ix_(seen, ~seen)])  # [n_seen, n_missing]
            filled[np.ix_(rows, np.flatnonzero(~seen))] = (
                mu[~seen] + (values[rows][:, seen] - mu[seen]) @ weights
            )
            rest = sigma[np.ix_(~seen, ~seen)] - sigma[np.ix_(~seen, seen)] @ weights
            extra[np.ix_(~seen, ~seen)] += len(rows) * rest
            left[rows] = max(float(rest.sum()), 0.0) / k**2
        mu = filled.mean(axis=0)
        centred = filled - mu
        sigma = _shrunk((centred.T @ centred + extra) / d, d)
    return Belief(filled.mean(axis=1), left, sigma)


def _shrunk(sample: Floats, d: int) -> Floats:
    """Pull a sample covariance ``[k, k]`` towards one variance and one covariance, the more the fewer the drafts."""
    k = len(sample)
    variance = float(np.trace(sample)) / k
    shared = float(sample.sum() - np.trace(sample)) / max(k * (k - 1), 1)
    shared = min(max(shared, 0.0), 0.98 * variance)
    target = shared * np.ones((k, k)) + (variance - shared) * np.eye(k)
    weight = k / 2  # as if so many drafts had been seen that look like the target
    return np.asarray((d * sample + weight * target) / (d + weight))

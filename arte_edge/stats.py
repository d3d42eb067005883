"""The statistics that are reported: an interval beside every accuracy, a paired test beside every gain.

A student scored on 200 questions moves by several points through luck alone, so no
accuracy is printed without its interval and no gain without a test on the *same*
questions. Rates scatter by factors, so two of them are compared by the ratio of their
geometric means. All of it is numpy and the standard library: the benchmark on a small
device needs it too, and scipy is not installed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_T_GRID = 20_001
_BOOTSTRAPS = 4_000


class Interval(NamedTuple):
    """Both ends of a confidence interval; a share runs from 0 to 1, a difference from -1 to 1."""

    low: float
    high: float


class PairedTest(NamedTuple):
    """Two systems on the same questions. `difference` is b minus a: above zero, b is better."""

    n: int
    only_a: int  # questions that a alone got right
    only_b: int
    p_value: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """b over a with its 95 % interval; the ends are None where a side has fewer than two samples."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def beyond_chance(self) -> bool | None:
        """True if the interval leaves 1 out; None without an interval."""
        return None if self.low is None or self.high is None else not self.low <= 1 <= self.high


def wilson(right: int, n: int, level: float = 0.95) -> Interval:
    """Return the score interval of the share ``right / n``.

    E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209–212. Unlike the textbook ``p ± z·s`` it keeps its coverage for few
    questions and for shares near 0 or 1. Without any answer (``n = 0``) every share is possible: 0 to 1.

    Raises ValueError: `right` is not between 0 and `n`.
    """
    if not 0 <= right <= n:
        raise ValueError(f"{right} right answers out of {n}")
    if n == 0:
        return Interval(0.0, 1.0)
    z = _z(level)
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The ends are exactly 0 and 1 for none and all right; rounding must not say otherwise.
    return Interval(0.0 if right == 0 else max(0.0, centre - half), 1.0 if right == n else min(1.0, centre + half))


def mcnemar(a: ArrayLike, b: ArrayLike) -> PairedTest:
    """Compare two systems that answered the same questions.

    The p-value is the exact two-sided McNemar test: of the questions that only one of the two got right, how surprising
    is the split under a fair coin (Q. McNemar, Psychometrika 12 (1947) 153–157). The interval of the paired difference
    is the square-and-add one, method 10 of R. G. Newcombe, Stat. Med. 17 (1998) 2635–2650. The exact test is the more
    careful of the two, so near 0.05 the interval may leave zero out while the p-value is still above.

    Args:
        a: ``[n]`` whether the first system (say, the base student) was right.
        b: ``[n]`` the same of the second (the tuned student).

    Raises ValueError: the two differ in length, or are empty.
    """
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise ValueError(f"a paired test needs two equal lists of answers: {first.shape}, {second.shape}")
    both = int(np.sum(first & second))
    only_a = int(np.sum(first & ~second))
    only_b = int(np.sum(~first & second))
    discordant = only_a + only_b
    tail = sum(comb(discordant, i) for i in range(min(only_a, only_b) + 1))
    p_value = min(1.0, 2 * tail / 2**discordant)
    interval = _newcombe(both, only_a, only_b, first.size - both - discordant)
    return PairedTest(first.size, only_a, only_b, p_value, (only_b - only_a) / first.size, *interval)


def format_share(base: float, base_forced: float, tuned: float) -> float | None:
    """Return which share, 0 to 1, of the gain from `base` to `tuned` is answer format alone.

    A base student that knows the answer but never closes the answer tag scores nothing. `base_forced` is its accuracy
    with the answer forced out of it: what forcing alone recovers was known before the training. None if `tuned` is no
    better than `base`: there is no gain to share out.
    """
    if tuned <= base:
        return None
    return min(1.0, max(0.0, (base_forced - base) / (tuned - base)))


def pearson(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return Pearson's r of two lists ``[n]``; None where one does not vary, or n is below 3."""
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(first) < 3 or first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def ratio(a: ArrayLike, b: ArrayLike) -> Ratio | None:
    """Return the ratio of the samples `b` to the samples `a`, all above zero; None if there are none.

    The ratio is that of geometric means. Its interval is Welch's t-test on the logarithms
    (B. L. Welch, Biometrika 34 (1947) 28–35). The samples of a row come from one process, so the
    interval covers the noise *within* the two runs, not the difference from one day to another.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not first.size or not second.size or min(first.min(), second.min()) <= 0:
        return None
    x, y = np.log(first), np.log(second)
    middle = float(y.mean() - x.mean())
    if x.size < 2 or y.size < 2:
        return Ratio(float(np.exp(middle)))
    u, v = float(x.var(ddof=1)) / x.size, float(y.var(ddof=1)) / y.size
    if u + v == 0:
        return Ratio(*[float(np.exp(middle))] * 3)
    freedom = (u + v) ** 2 / (u * u / (x.size - 1) + v * v / (y.size - 1))
    half = t_quantile(0.975, freedom) * float(np.sqrt(u + v))
    return Ratio(*(float(np.exp(at)) for at in (middle, middle - half, middle + half)))


def t_quantile(level: float, freedom: float) -> float:
    """Return the quantile of Student's t: with t = √ν·tan θ its density in θ is cos^(ν-1) θ, added up here."""
    theta = np.linspace(-np.pi / 2, np.pi / 2, _T_GRID)
    density = np.cos(theta).clip(0) ** (freedom - 1)
    sums = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(freedom) * np.tan(np.interp(level, sums / sums[-1], theta)))


def over_seeds_and_questions(grids: Sequence[ArrayLike], n_draw: int = _BOOTSTRAPS) -> tuple[float, Interval]:
    """Return the mean of paired differences and its 95 % interval over seeds and questions, by hierarchical bootstrap.

    Each draw takes as many seeds as there are, with replacement, then questions, with replacement and the same ones for
    every seed drawn: seeds answer the same test, and its questions do not become more by that (the crossed bootstrap
    of A. B. Owen, Ann. Appl. Stat. 1 (2007) 386-411). A bootstrap of s seeds spreads by sqrt((s - 1) / s) too little,
    so the seeds' means are first moved apart by its inverse; with three seeds the ends are still those of a small
    sample. One seed leaves its own scatter out. Several tasks count alike, and each draws for itself.

    Args:
        grids: for each task ``[n_seed, n_question]``, the difference of two systems (right minus right: -1, 0, 1).
        n_draw: number of bootstrap samples.

    Raises ValueError: no task, or one without seeds or questions.
    """
    random = np.random.default_rng(0)
    total, mean = np.zeros(n_draw), 0.0
    for given in grids:
        grid = np.asarray(given, dtype=float)
        if grid.ndim != 2 or not grid.size:
            raise ValueError(f"a grid of seeds and questions has the shape {grid.shape}")
        n_seed, n_question = grid.shape
        by_seed = grid.mean(axis=1, keepdims=True)
        if n_seed > 1:
            grid = grid + (by_seed - by_seed.mean()) * (sqrt(n_seed / (n_seed - 1)) - 1)
        seeds = random.multinomial(n_seed, np.full(n_seed, 1 / n_seed), n_draw) / n_seed
        questions = random.multinomial(n_question, np.full(n_question, 1 / n_question), n_draw) / n_question
        total += ((seeds @ grid) * questions).sum(axis=1)
        mean += float(grid.mean())
    if not len(grids):
        raise ValueError("no task to compare on")
    low, high = np.quantile(total / len(grids), [0.025, 0.975])
    return mean / len(grids), Interval(float(low), float(high))


def _newcombe(both: int, only_a: int, only_b: int, neither: int) -> Interval:
    """Join the Wilson intervals of the two shares, less what their correlation explains."""
    n = both + only_a + only_b + neither
    right_a, right_b = both + only_a, both + only_b
    share_a, share_b = right_a / n, right_b / n
    low_a, high_a = wilson(right_a, n)
    low_b, high_b = wilson(right_b, n)
    covariance = float(both * neither - only_a * only_b)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)
    margins = right_a * (n - right_a) * right_b * (n - right_b)
    phi = covariance / sqrt(margins) if margins else 0.0
    difference = share_b - share_a
    down, up = share_b - low_b, high_a - share_a
    low = difference - sqrt(max(0.0, down**2 - 2 * phi * down * up + up**2))
    down, up = share_a - low_a, high_b - share_b
    high = difference + sqrt(max(0.0, down**2 - 2 * phi * down * up + up**2))
    return Interval(low, high)


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"a confidence level lies between 0 and 1: {level}")
    return NormalDist().inv_cdf((1 + level) / 2)

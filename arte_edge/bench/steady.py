"""What a list of times says: spread, percentiles, and whether the machine slowed down on the way.

Percentiles are given only from the number of samples on that supports them, by the rule of MLPerf
Inference (early stopping, 99 % confidence): 64 samples for the 90th, 662 for the 99th.

Slowing down: every token's time is first divided by the median of its position over the repetitions,
since a token deep in the context costs more. The relative rates are averaged in time bins; the slope is
Theil and Sen's (a single pause does not move it) and its chance level Mann and Kendall's rank test on
the bins. An ordinary least-squares t over single tokens would call nearly everything significant: the
times of neighbouring tokens are anything but independent, and a pause of the system has weight.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pace", "Trend", "min_samples", "pace", "percentile", "spread", "trend"]

_CONFIDENCE = 0.99
_BINS = 60
_FEWEST_BINS = 8
_FEWEST_TOKENS = 64
_SHORTEST_S = 5.0  # in less than this nothing warms up
_BURST_S = 10.0
_CHANCE = 0.01
_MATTERS = 0.05  # of the rate, lost from the first bin to the last


@dataclass(frozen=True)
class Trend:
    """How the rate moved during a test. `slowed`: it fell, beyond chance and by more than 5 %."""

    slope_percent_per_min: float
    p_value: float
    slowed: bool


@dataclass(frozen=True)
class Pace:
    """Tokens a second at the beginning of a test and in its last third."""

    burst_ts: float
    sustained_ts: float


def spread(values: Sequence[float]) -> float:
    """Return the coefficient of variation: sample standard deviation over mean, 0 for fewer than two."""
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else 0.0


def min_samples(share: float) -> int:
    """Return from how many samples on the percentile `share` is given.

    The smallest n for which at most one sample above the true percentile has a probability under 1 %:
    ``share**n + n (1 - share) share**(n - 1) < 0.01`` (MLPerf Inference rules, appendix on early stopping).
    """
    n = 2
    while share**n + n * (1 - share) * share ** (n - 1) >= 1 - _CONFIDENCE:
        n += 1
    return n


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the percentile (0.95 for the 95th), None from too few samples; the median from any."""
    if not values or (share > 0.5 and len(values) < min_samples(share)):
        return None
    return float(np.quantile(np.asarray(values, dtype=np.float64), share))


def pace(token_ns: Sequence[Sequence[int]]) -> Pace | None:
    """Return the rates at the beginning and in the end; see `trend` for the argument.

    The beginning is the first ten seconds, or the first third of a test shorter than thirty. None from
    fewer than three tokens.
    """
    times_s = _durations(token_ns)
    ends = np.cumsum(times_s)  # what lies between the repetitions is no part of it
    if len(ends) < 3:
        return None
    total = float(ends[-1])
    n_first = max(1, int(np.searchsorted(ends, min(_BURST_S, total / 3), side="right")))
    start = min(int(np.searchsorted(ends, total * 2 / 3, side="right")), len(ends) - 1)
    return Pace(n_first / float(ends[n_first - 1]), (len(ends) - start) / float(times_s[start:].sum()))


def trend(token_ns: Sequence[Sequence[int]]) -> Trend | None:
    """Return how the rate moved, None if the test is too short to tell.

    Args:
        token_ns: for each repetition the times at which a token was there, the first one when it
            began, on one clock in nanoseconds: ``[repetition][n + 1]``.
    """
    rows = [np.diff(np.asarray(times, dtype=np.float64)) / 1e9 for times in token_ns]
    n_all = sum(map(len, rows))
    if len(rows) < 3 or n_all < _FEWEST_TOKENS:
        return None
    width = max(map(len, rows))
    table = np.full((len(rows), width), np.nan)
    for row, times in zip(table, rows, strict=True):
        row[: len(times)] = times
    usual = np.nanmedian(table, axis=0)  # by position
    moments = np.concatenate([np.asarray(times[1:], dtype=np.float64) for times in token_ns]) / 1e9
    expected = np.concatenate([usual[: len(times)] for times in rows])
    taken = np.concatenate(rows)
    length_s = float(moments[-1] - moments[0])
    if length_s < _SHORTEST_S:
        return None
    n_bin = max(_FEWEST_BINS, min(_BINS, int(length_s), n_all // 8))
    bins = np.minimum(((moments - moments[0]) / length_s * n_bin).astype(int), n_bin - 1)
    filled = np.unique(bins)
    if len(filled) < _FEWEST_BINS:
        return None
    rate = np.array([expected[bins == b].sum() / taken[bins == b].sum() for b in filled])
    when = np.array([moments[bins == b].mean() for b in filled])
    slope = _theil_sen(when, rate)  # of the relative rate, a second
    p_value = _mann_kendall_falls(rate)
    lost = -slope * (when[-1] - when[0])
    return Trend(slope * 60 * 100, p_value, bool(p_value < _CHANCE and lost > _MATTERS))


def _durations(token_ns: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    rows = [np.diff(np.asarray(times, dtype=np.float64)) / 1e9 for times in token_ns]
    return np.concatenate(rows) if rows else np.empty(0)


def _theil_sen(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return the median slope over all pairs of points."""
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])))


def _mann_kendall_falls(values: NDArray[np.float64]) -> float:
    """Return the one-sided chance of ranks that fall so steadily in a series without a trend.

    Normal approximation with continuity correction (Kendall 1975); at eight points it is good to 0.002.
    """
    n = len(values)
    i, j = np.triu_indices(n, 1)
    score = float(np.sign(values[j] - values[i]).sum())
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    corrected = score + 1 if score < 0 else score - 1 if score > 0 else 0.0
    return 0.5 * math.erfc(-corrected / deviation / math.sqrt(2))

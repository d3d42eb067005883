"""By what factor two rates differ, and whether that is more than chance.

A ratio is that of geometric means, with a 95 % interval from Welch's t-test on the logarithms of
the samples (B. L. Welch, Biometrika 34 (1947) 28–35): rates scatter by factors, not by amounts.
The samples of a row come from one process, so the interval says how far chance *within* the two
runs reaches, not what another day would bring.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Ratio", "ratio", "t_quantile"]

_GRID = 20_001


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


def ratio(a: ArrayLike, b: ArrayLike) -> Ratio | None:
    """Return the ratio of the samples `b` to the samples `a`, all above zero; None if there are none."""
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
    theta = np.linspace(-np.pi / 2, np.pi / 2, _GRID)
    density = np.cos(theta).clip(0) ** (freedom - 1)
    sums = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(freedom) * np.tan(np.interp(level, sums / sums[-1], theta)))

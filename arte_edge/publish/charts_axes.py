"""Scales of a chart: round ticks, linear or logarithmic, and numbers as people write them."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Axis", "around", "number"]

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, in the unit that `label` names. `log`: equal factors are equally far apart."""

    label: str
    low: float
    high: float
    log: bool = False
    n_ticks: int = 5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"axis '{self.label}': {self.low} to {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"axis '{self.label}': a logarithmic axis begins above zero")

    def share(self, value: float) -> float:
        """Return where `value` lies, 0 at `low` and 1 at `high`."""
        if self.log:
            return math.log(max(value, 1e-12) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        """Round values between both ends."""
        return self._log_ticks() if self.log else self._linear_ticks()

    def _linear_ticks(self) -> list[float]:
        rough = (self.high - self.low) / max(self.n_ticks, 1)
        power = 10 ** math.floor(math.log10(rough))
        step = next(step * power for step in _STEPS if step * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            every = [digit * 10.0**power for power in powers for digit in digits]
            ticks = [tick for tick in every if self.low * 0.999 <= tick <= self.high * 1.001]
            if len(ticks) <= 2 * self.n_ticks:
                break
        return ticks if len(ticks) > 2 else self._linear_ticks()  # a narrow range holds few such numbers


def around(
    label: str, values: list[float], *, zero: bool = False, log: bool = False, most: float = math.inf
) -> Axis:
    """Return an axis that holds all `values` with a little room.

    `zero`: it begins at zero; `most`: it ends there, unless a value lies beyond.
    """
    low, high = min(values), max(values)
    if log:
        return Axis(label, low / 1.25, high * 1.25, log=True)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(label, 0.0 if zero else low - room, min(high + room, max(most, high)))


def number(value: float) -> str:
    """Return a short text: 3 significant digits, no needless zeros, thousands with a thin space."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u2009")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 6)}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "\u2212") or "0"

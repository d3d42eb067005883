"""One chart as inline SVG: axes with round ticks, a frame, and marks that are distinct without colour.

Series 0 to 7 have a colour each (M. Okabe and K. Ito's palette, which people with the common kinds of
colour blindness can tell apart; the page's style sheet holds it, once for light and once for dark)
and a shape each. The drawing scales with the page; 480 units are wide enough for two charts side by
side and still readable on a phone. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from zlib import crc32

__all__ = ["SHAPES", "Axis", "Plot", "around", "number"]

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


_WIDTH = 480
_CHAR = 6.7  # mean width of a character at 12 units
_ROW = 24
SHAPES = ("circle", "square", "triangle", "diamond", "down", "plus", "cross", "bar")


class Plot:
    """A frame to draw into. `y` is an axis, or the names of rows from top to bottom."""

    def __init__(
        self,
        x: Axis,
        y: Axis | Sequence[str],
        *,
        title: str,
        desc: str,
        legend: Sequence[tuple[str, int]] = (),
    ) -> None:
        """Begin a chart; `title` and `desc` are read out by screen readers, `legend` is (name, series)."""
        self.x, self.y = x, y if isinstance(y, Axis) else None
        self.rows = () if isinstance(y, Axis) else tuple(y)
        self.title, self.desc = title, desc
        labels = [number(t) for t in self.y.ticks] if self.y else [_cut(row) for row in self.rows]
        self._left = 14 + _CHAR * max((len(label) for label in labels), default=0) + (22 if self.y else 0)
        self._right = _WIDTH - 14.0
        self._legend, legend_height = _legend_of(legend)
        self._top = 20.0 + legend_height
        inner = 210 if self.y else max(_ROW * len(self.rows), _ROW)
        self._bottom = self._top + inner
        self._height = self._bottom + 44
        self._marks: list[str] = []

    def px(self, value: float) -> float:
        return round(self._left + self.x.share(value) * (self._right - self._left), 1)

    def py(self, value: float) -> float:
        """Return the height of a value, or of row number `value`."""
        if self.y is None:
            return round(self._top + (value + 0.5) * _ROW, 1)
        return round(self._bottom - self.y.share(value) * (self._bottom - self._top), 1)

    def mark(self, x: float, y: float, series: int = 0, *, tip: str = "", hollow: bool = False) -> None:
        """Draw one point; `hollow`: predicted, or otherwise not quite one of the others."""
        body = _shape(SHAPES[series % len(SHAPES)], self.px(x), self.py(y))
        self._add(f"s{series % 8}{' hollow' if hollow else ''}", body, tip)

    def line(self, points: Sequence[tuple[float, float]], series: int = 0, *, style: str = "") -> None:
        """Join points; `style` is "", "dashed" or "faint"."""
        path = " ".join(f"{self.px(x)},{self.py(y)}" for x, y in points)
        self._add(f"s{series % 8} line {style}".strip(), f'<polyline points="{path}"/>')

    def whisker(self, x: tuple[float, float], y: tuple[float, float], series: int = 0) -> None:
        """Draw an interval from (x0, y0) to (x1, y1), horizontal or vertical, with its ends."""
        x0, x1, y0, y1 = self.px(x[0]), self.px(x[1]), self.py(y[0]), self.py(y[1])
        dx, dy = (0, 4) if y0 == y1 else (4, 0)
        ends = "".join(f"M{px - dx} {py - dy}L{px + dx} {py + dy}" for px, py in ((x0, y0), (x1, y1)))
        self._add(f"s{series % 8} line", f'<path d="M{x0} {y0}L{x1} {y1}{ends}"/>')

    def box(self, x: tuple[float, float], y: tuple[float, float], series: int = 0, *, tip: str = "") -> None:
        """Fill a rectangle between values."""
        x0, x1 = sorted((self.px(x[0]), self.px(x[1])))
        y0, y1 = sorted((self.py(y[0]), self.py(y[1])))
        body = f'<rect x="{x0}" y="{y0}" width="{max(x1 - x0, 1):.1f}" height="{max(y1 - y0, 1):.1f}"/>'
        self._add(f"s{series % 8} area", body, tip)

    def bar(self, row: int, value: float, series: int = 0, *, tip: str = "") -> None:
        """Fill a horizontal bar in a row, from the axis to `value`, which is written beside it."""
        x0, x1, y = self.px(max(self.x.low, 0.0)), self.px(value), self.py(row)
        width = max(x1 - x0, 1)
        body = f'<rect x="{x0}" y="{y - 8}" width="{width:.1f}" height="16"/>'
        self._add(f"s{series % 8} area", body, tip)
        inside = x1 + _CHAR * len(tip) + 8 > self._right
        place = f'x="{x1 - 5}" text-anchor="end" class="on"' if inside else f'x="{x1 + 5}"'
        self._marks.append(f'<text {place} y="{y + 4}">{escape(tip)}</text>')

    def rule(self, x: float, label: str) -> None:
        """Draw a vertical line at a value that matters, with its name."""
        px = self.px(x)
        end = ' text-anchor="end"' if px > self._right - _CHAR * len(label) else ""
        at = px - 4 if end else px + 4
        self._marks.append(
            f'<g class="rule"><path d="M{px} {self._top - 14}V{self._bottom}"/>'
            f'<text x="{at}" y="{self._top - 5}"{end}>{escape(label)}</text></g>'
        )

    def svg(self) -> str:
        """Return the chart."""
        n = crc32(f"{self.title}|{self.desc}".encode())  # the same run makes the same page
        return (
            f'<svg viewBox="0 0 {_WIDTH} {self._height:.0f}" role="img" aria-labelledby="t{n} d{n}">'
            f'<title id="t{n}">{escape(self.title)}</title><desc id="d{n}">{escape(self.desc)}</desc>'
            f"{self._frame()}{self._legend}{''.join(self._marks)}</svg>"
        )

    def _add(self, kind: str, body: str, tip: str = "") -> None:
        inner = f"<title>{escape(tip)}</title>" if tip else ""
        self._marks.append(f'<g class="{kind}">{inner}{body}</g>')

    def _frame(self) -> str:
        parts = []
        for tick in self.x.ticks:
            px = self.px(tick)
            parts.append(f'<path class="grid" d="M{px} {self._top}V{self._bottom}"/>')
            parts.append(f'<text x="{px}" y="{self._bottom + 16}" text-anchor="middle">{number(tick)}</text>')
        if self.y:
            for tick in self.y.ticks:
                py = self.py(tick)
                parts.append(f'<path class="grid" d="M{self._left:.1f} {py}H{self._right}"/>')
                parts.append(
                    f'<text x="{self._left - 6:.1f}" y="{py + 4}" text-anchor="end">{number(tick)}</text>'
                )
            middle = (self._top + self._bottom) / 2
            parts.append(
                f'<text class="label" transform="translate(13 {middle:.1f}) rotate(-90)" '
                f'text-anchor="middle">{escape(self.y.label)}</text>'
            )
        for i, row in enumerate(self.rows):
            full = f"<title>{escape(row)}</title>" if _cut(row) != row else ""
            parts.append(
                f'<text x="{self._left - 6:.1f}" y="{self.py(i) + 4}" text-anchor="end">'
                f"{full}{escape(_cut(row))}</text>"
            )
        parts.append(f'<path class="axis" d="M{self._left:.1f} {self._top}V{self._bottom}H{self._right}"/>')
        centre = (self._left + self._right) / 2
        parts.append(
            f'<text class="label" x="{centre:.1f}" y="{self._bottom + 36}" text-anchor="middle">'
            f"{escape(self.x.label)}</text>"
        )
        return "".join(parts)


def _cut(text: str, most: int = 30) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _legend_of(entries: Sequence[tuple[str, int]]) -> tuple[str, float]:
    """Return the legend above the frame and its height; entries wrap."""
    x, y, parts = 14.0, 14.0, []
    for name, series in entries:
        text = _cut(name, 40)
        width = 22 + _CHAR * len(text)
        if x + width > _WIDTH - 8 and x > 14:
            x, y = 14.0, y + 18
        parts.append(f'<g class="s{series % 8}">{_shape(SHAPES[series % len(SHAPES)], x + 5, y - 4)}</g>')
        parts.append(f'<text x="{x + 14:.1f}" y="{y}">{escape(text)}</text>')
        x += width
    return "".join(parts), (y + 2 if entries else 0.0)


def _shape(kind: str, x: float, y: float, r: float = 4.2) -> str:
    if kind == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{r}"/>'
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "triangle": ((0, -1.25), (1.15, 0.9), (-1.15, 0.9)),
        "down": ((0, 1.25), (1.15, -0.9), (-1.15, -0.9)),
        "diamond": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        "bar": ((-0.5, -1.5), (0.5, -1.5), (0.5, 1.5), (-0.5, 1.5)),
    }
    if kind in corners:
        points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners[kind])
        return f'<polygon points="{points}"/>'
    arms = ((-1, 0, 1, 0), (0, -1, 0, 1)) if kind == "plus" else ((-1, -1, 1, 1), (-1, 1, 1, -1))
    path = "".join(f"M{x + r * a:.1f} {y + r * b:.1f}L{x + r * c:.1f} {y + r * d:.1f}" for a, b, c, d in arms)
    return f'<path class="stroke" d="{path}"/>'

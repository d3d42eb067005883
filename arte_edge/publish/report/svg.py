"""One chart as inline SVG: axes with round ticks, a frame, and marks that are distinct without colour.

Series 0 to 7 have a colour each (M. Okabe and K. Ito's palette, distinct to people with the common kinds of
colour blindness; the page's style sheet holds it, once for light and once for dark) and a shape each. The
drawing scales with the page; 480 units are wide enough for two charts side by side and still readable on a
phone. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from zlib import crc32

__all__ = ["SHAPES", "Axis", "Plot", "around", "number"]

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_TICKS = 5  # about so many on an axis
_WIDTH = 480
_CHAR = 7.3  # mean width of a character at 12 units, of a wide font
_ROW = 24
SHAPES = ("circle", "square", "triangle", "diamond", "down", "plus", "cross", "bar")
# Corners of the filled shapes, and the strokes of the other two, in units of the radius.
_CORNERS = {
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle": ((0, -1.25), (1.15, 0.9), (-1.15, 0.9)),
    "down": ((0, 1.25), (1.15, -0.9), (-1.15, -0.9)),
    "diamond": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
    "bar": ((-0.5, -1.5), (0.5, -1.5), (0.5, 1.5), (-0.5, 1.5)),
}
_STROKES = {"plus": ((-1, 0, 1, 0), (0, -1, 0, 1)), "cross": ((-1, -1, 1, 1), (-1, 1, 1, -1))}


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, in the unit that `label` names. `log`: equal factors are equally far apart."""

    label: str
    low: float
    high: float
    log: bool = False

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
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                every = [digit * 10.0**power for power in powers for digit in digits]
                found = [tick for tick in every if self.low * 0.999 <= tick <= self.high * 1.001]
                if len(found) <= 2 * _TICKS:
                    break
            if len(found) > 2:  # a narrow range holds few such numbers
                return found
        rough = (self.high - self.low) / _TICKS
        power = 10 ** math.floor(math.log10(rough))
        step = next(step * power for step in _STEPS if step * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def around(label: str, values: Sequence[float], *, log: bool = False) -> Axis:
    """Return an axis that holds all `values` with a little space at both ends."""
    low, high = min(values), max(values)
    if log:
        return Axis(label, low / 1.25, high * 1.25, log=True)
    space = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(label, low - space, high + space)


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
        labels = [number(t) for t in self.y.ticks] if self.y else self.rows
        self._left = 14 + _CHAR * min(max(map(len, labels), default=0), 30) + (22 if self.y else 0)
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
        """Draw one point; `hollow`: predicted."""
        self._add(f"s{series % 8}{' hollow' if hollow else ''}", _shape(series, self.px(x), self.py(y)), tip)

    def line(self, points: Sequence[tuple[float, float]], series: int = 0, *, dashed: bool = False) -> None:
        """Join points."""
        path = " ".join(f"{self.px(x)},{self.py(y)}" for x, y in points)
        self._add(f"s{series % 8} line{' dashed' if dashed else ''}", f'<polyline points="{path}"/>')

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
        body = f'<rect x="{x0}" y="{y - 8}" width="{max(x1 - x0, 1):.1f}" height="16"/>'
        self._add(f"s{series % 8} area", body, tip)
        inside = x1 + _CHAR * len(tip) + 8 > self._right
        place = (x1 - 5, y + 4, "end", 'class="on"') if inside else (x1 + 5, y + 4)
        self._marks.append(_text(tip, *place))

    def rule(self, x: float, label: str) -> None:
        """Draw a vertical line at a value that matters, with its name."""
        px, y = self.px(x), self._top - 5
        at_end = px > self._right - _CHAR * len(label)
        name = _text(label, px - 4, y, "end") if at_end else _text(label, px + 4, y)
        self._marks.append(f'<g class="rule"><path d="M{px} {self._top - 14}V{self._bottom}"/>{name}</g>')

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
        left, right, top, bottom = round(self._left, 1), self._right, self._top, self._bottom
        parts = []
        for tick in self.x.ticks:
            px = self.px(tick)
            parts.append(f'<path class="grid" d="M{px} {top}V{bottom}"/>')
            parts.append(_text(number(tick), px, bottom + 16, "middle"))
        names = [(self.py(i), row) for i, row in enumerate(self.rows)]
        if self.y:
            names = [(self.py(tick), number(tick)) for tick in self.y.ticks]
            parts += [f'<path class="grid" d="M{left} {py}H{right}"/>' for py, _ in names]
            turned = f'transform="translate(13 {(top + bottom) / 2:.1f}) rotate(-90)"'
            parts.append(_text(self.y.label, 0, 0, "middle", f'class="label" {turned}'))
        parts += [_text(name, left - 6, py + 4, "end") for py, name in names]
        parts.append(f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>')
        parts.append(_text(self.x.label, (left + right) / 2, bottom + 36, "middle", 'class="label"'))
        return "".join(parts)


def _text(text: str, x: float, y: float, anchor: str = "start", more: str = "", most: int = 30) -> str:
    """Return a text element; the full text of one that is cut is shown on hover."""
    cut = text if len(text) <= most else text[: most - 1].rstrip() + "…"
    title = f"<title>{escape(text)}</title>" if cut != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{title}{escape(cut)}</text>'


def _legend_of(entries: Sequence[tuple[str, int]]) -> tuple[str, float]:
    """Return the legend above the frame and its height; entries wrap."""
    x, y, parts = 14.0, 14.0, []
    for name, series in entries:
        width = 26 + _CHAR * min(len(name), 40)
        if x + width > _WIDTH - 8 and x > 14:
            x, y = 14.0, y + 18
        parts.append(f'<g class="s{series % 8}">{_shape(series, x + 5, y - 4)}</g>')
        parts.append(_text(name, x + 14, y, most=40))
        x += width
    return "".join(parts), (y + 2 if entries else 0.0)


def _shape(series: int, x: float, y: float, r: float = 4.2) -> str:
    kind = SHAPES[series % len(SHAPES)]
    if kind == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{r}"/>'
    if kind in _CORNERS:
        points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in _CORNERS[kind])
        return f'<polygon points="{points}"/>'
    path = "".join(
        f"M{x + r * a:.1f} {y + r * b:.1f}L{x + r * c:.1f} {y + r * d:.1f}" for a, b, c, d in _STROKES[kind]
    )
    return f'<path class="stroke" d="{path}"/>'

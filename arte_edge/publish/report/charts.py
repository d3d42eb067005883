"""The charts of a report, each made from the rows that it shows. A chart without data is None.

Token times and sensor readings are drawn one below the other. Their clocks differ (tokens are counted
over all repetitions, sensors from the start of the test, warm-up included), so they do not share an axis.

A chart is inline SVG. Series 0 to 7 have a colour each (M. Okabe and K. Ito's palette, distinct to people with the
common kinds of colour blindness; the page's style sheet holds it, once for light and once for dark) and a shape each,
so they are distinct without colour. The drawing scales with the page; 480 units are wide enough for two charts side
by side and still readable on a phone. All text is escaped here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np

from arte_edge.results.rows import SpeedRow
from arte_edge.stats import pearson

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
        self, x: Axis, y: Axis | Sequence[str], *, title: str, desc: str, legend: Sequence[tuple[str, int]] = ()
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


def _shape(series: int, x: float, y: float) -> str:
    r = 4.2
    kind = SHAPES[series % len(SHAPES)]
    if kind == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{r}"/>'
    if kind in _CORNERS:
        points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in _CORNERS[kind])
        return f'<polygon points="{points}"/>'
    path = "".join(f"M{x + r * a:.1f} {y + r * b:.1f}L{x + r * c:.1f} {y + r * d:.1f}" for a, b, c, d in _STROKES[kind])
    return f'<path class="stroke" d="{path}"/>'


Rows = Sequence[dict[str, Any]]
_MOST_QUESTIONS = 16
_BIN_WORDS = 10
_SCORE = "preference score"
_MOST_TRACES = 6
_MOST_POINTS = 400  # more are indistinguishable in a chart of this width


@dataclass(frozen=True)
class Chart:
    """A chart and its caption."""

    svg: str
    caption: str


def time_chart(seconds: dict[str, float]) -> Chart | None:
    """Bars of minutes (or seconds) a stage."""
    found = {name: value for name, value in seconds.items() if value > 0}
    if not found:
        return None
    longest = max(found.values())
    unit, scale = ("minutes", 60) if longest > 180 else ("seconds", 1)
    plot = Plot(
        Axis(unit, 0, longest / scale * 1.06),
        list(found),
        title="Time a stage",
        desc="; ".join(f"{name} {value:.0f} s" for name, value in found.items()),
    )
    for row, value in enumerate(found.values()):
        plot.bar(row, value / scale, 4, tip=number(value / scale))
    total = sum(found.values()) / 60
    return Chart(plot.svg(), f"{total:.1f} minutes in all, over all starts of the run.")


def histogram_chart(values: Sequence[float], label: str, what: str) -> Chart | None:
    """The distribution of `values`."""
    if len(values) < 3:
        return None
    data = np.asarray(values, dtype=float)
    n_bins = int(np.clip(np.ceil(np.sqrt(data.size)), 5, 24))
    width = (data.max() - data.min()) or max(abs(float(data[0])), 1.0) * 0.1
    edges = np.linspace(data.max() - width, data.max(), n_bins + 1)
    counts, _ = np.histogram(data, edges)
    plot = Plot(
        around(label, edges.tolist()),
        Axis(what, 0, float(counts.max()) * 1.1),
        title=f"Distribution of {label} over {what}",
        desc=f"{data.size} {what}, from {number(data.min())} to {number(data.max())}, median {number(np.median(data))}",
    )
    for n, (low, high) in zip(counts.tolist(), pairwise(edges.tolist()), strict=True):
        if n:
            plot.box((low, high), (0, n), 4, tip=f"{n} from {number(low)} to {number(high)}")
    plot.rule(float(np.median(data)), "median")
    return Chart(
        plot.svg(), f"{data.size} {what}, mean {number(data.mean())}, standard deviation {number(data.std())}."
    )


def questions_chart(scores: Rows, questions: Rows) -> Chart | None:
    """One row a question: the scores of its rationales by technique, and their mean as a bar."""
    by_question: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in scores:
        by_question[row["question"]].append(row)
    ranked = sorted((q for q in questions if q["id"] in by_question), key=lambda q: -q["score"])
    if not ranked:
        return None
    half = _MOST_QUESTIONS // 2
    shown = ranked if len(ranked) <= _MOST_QUESTIONS else [*ranked[:half], *ranked[-half:]]
    values = [row["score"] for q in shown for row in by_question[q["id"]]]
    plot = Plot(
        around(_SCORE, values),
        [str(q["input"]) for q in shown],
        title="Score of each question's rationales",
        desc=f"{len(shown)} questions, best first; {number(min(values))} to {number(max(values))}",
        legend=[*_techniques(scores), ("mean", 7)],
    )
    for i, question in enumerate(shown):
        for row in by_question[question["id"]]:
            plot.mark(row["score"], i, max(row["technique"], 0), tip=f"{row['score']:.3f}: {row['text']}")
        plot.mark(question["score"], i, 7)
    part = "" if len(shown) == len(ranked) else f" The best and the worst {half} of {len(ranked)}."
    return Chart(plot.svg(), f"One candidate question per row, highest mean first.{part}")


def _techniques(scores: Rows) -> list[tuple[str, int]]:
    found = sorted({int(row["technique"]) for row in scores})
    return [(f"technique {t + 1}" if t >= 0 else "answer without reasons", max(t, 0)) for t in found]


def length_chart(scores: Rows, budget: int | None = None) -> Chart | None:
    """The words in a rationale against its score, with the mean of each bin of ten words."""
    if len(scores) < 3 or all(row["technique"] < 0 for row in scores):  # answers without reasons
        return None
    words = np.array([len(str(row["text"]).split()) for row in scores])
    values = np.array([float(row["score"]) for row in scores])
    bins = words // _BIN_WORDS
    members = [bins == found for found in np.unique(bins)]
    means = [(float(words[m].mean()), float(values[m].mean())) for m in members if m.sum() >= 2]
    r = pearson(words, values)
    correlation = "correlation undefined" if r is None else f"r = {r:+.2f}"
    plot = Plot(
        around("words in the rationale", words.tolist()),
        around(_SCORE, values.tolist()),
        title="Length of a rationale against its score",
        desc=f"{len(scores)} rationales of {words.min()} to {words.max()} words; {correlation}",
        legend=[*_techniques(scores), ("mean of ten words", 6)],
    )
    if len(means) > 1:
        plot.line(means, 6, dashed=True)
    for x, y, row in zip(words.tolist(), values.tolist(), scores, strict=True):
        plot.mark(x, y, int(row["technique"]), tip=f"{x} words, {y:.3f}: {row['text']}")
    for x, y in means:
        plot.mark(x, y, 6)
    long = "" if budget is None else f" Candidates over {budget} tokens are penalised for their length."
    return Chart(plot.svg(), f"{len(scores)} rationales, {correlation}.{long}")


def loss_chart(log: Rows, key: str, label: str, what: str) -> Chart | None:
    """A metric of a training run, step by step."""
    points = [(float(i), float(row[key])) for i, row in enumerate(log, 1) if row.get(key) is not None]
    if len(points) < 3:
        return None
    first, last = number(points[0][1]), number(points[-1][1])
    plot = Plot(
        around("optimizer steps logged", [x for x, _ in points]),
        around(label, [y for _, y in points]),
        title=f"{what}: {label}",
        desc=f"from {first} to {last} in {len(points)} steps",
    )
    plot.line(points, 4)
    for x, y in points if len(points) <= 40 else ():
        plot.mark(x, y, 4, tip=f"{y:.4f}")
    return Chart(plot.svg(), f"{what}, {label}: {first} at first, {last} at the end.")


def accuracy_chart(rows: Rows, chance: float | None) -> Chart | None:
    """Accuracies with their 95 % intervals; each row has label, accuracy, low, high and series."""
    if not rows:
        return None
    plot = Plot(
        Axis("accuracy, %", 0, max(5.0, min(100.0, 105 * max(row["high"] for row in rows)))),
        [str(row["label"]) for row in rows],
        title="Accuracy, with 95 % intervals",
        desc="; ".join(f"{r['label']} {r['accuracy']:.1%} ({r['low']:.1%} to {r['high']:.1%})" for r in rows),
    )
    if chance is not None:
        plot.rule(100 * chance, "majority baseline")
    for i, row in enumerate(rows):
        series = int(row["series"])
        plot.whisker((100 * row["low"], 100 * row["high"]), (i, i), series)
        plot.mark(100 * row["accuracy"], i, series, tip=f"{row['accuracy']:.1%}, n = {row['n']}")
    return Chart(plot.svg(), f"n = {rows[0]['n']}. Bars are 95 % Wilson intervals.")


def pareto_chart(device: str, points: Rows, front: Sequence[str], accuracy: bool) -> Chart | None:
    """Decode rate against accuracy (or size); each point has file, name, decode, predicted, y, low and high."""
    if not points:
        return None
    names = [f"{p['name']}{' (predicted)' if p['predicted'] else ''}" for p in points]
    ends = [p[key] for p in points for key in ("y", "low", "high") if p.get(key) is not None]
    y_axis = around("accuracy, %" if accuracy else "size, MB", ends)
    plot = Plot(
        around("decode, tokens/s (logarithmic)", [p["decode"] for p in points], log=True),
        Axis(y_axis.label, max(y_axis.low, 0.0), min(y_axis.high, 100.0) if accuracy else y_axis.high),
        title=f"{'Accuracy' if accuracy else 'Size'} against speed on {device}",
        desc="; ".join(
            f"{n}: {number(p['decode'])} tokens/s, {number(p['y'])}" for n, p in zip(names, points, strict=True)
        ),
        legend=[(name, i) for i, name in enumerate(names)],
    )
    plot.line(sorted((p["decode"], p["y"]) for p in points if p["file"] in front), 7, dashed=True)
    for i, p in enumerate(points):
        x, y = p["decode"], p["y"]
        if p.get("low") is not None:
            plot.whisker((x, x), (p["low"], p["high"]), i)
        plot.mark(x, y, i, hollow=p["predicted"], tip=f"{p['file']}: {number(x)} tokens/s")
    hollow = " Hollow marks are predicted, not measured." if any(p["predicted"] for p in points) else ""
    return Chart(plot.svg(), f"The dashed line is the Pareto front: files that no other file dominates.{hollow}")


def traced(rows: Sequence[SpeedRow]) -> list[SpeedRow]:
    """Return the tests to draw: of each file on each device the fastest that wrote tokens, and throttled ones.

    None that other work disturbed.
    """
    writing = [row for row in rows if row.ok and row.n_gen and any(row.itl_samples_ms) and not row.contended]
    best: dict[tuple[str, str, bool], SpeedRow] = {}
    for row in writing:
        key = (row.model_filename, row.device.fingerprint, bool(row.throttled))
        if key not in best or row.median_ts > best[key].median_ts:
            best[key] = row
    return sorted(best.values(), key=lambda r: (r.model_filename, r.device.fingerprint))[:_MOST_TRACES]


def trace_of(row: SpeedRow) -> tuple[str, Chart, Chart | None]:
    """Return a title, and the charts of token times and of sensors, None where the device reports nothing."""
    where = row.device.profile or row.device.cpu
    name = f"{row.model_filename} on {where}, {row.n_threads} thread{'s' * (row.n_threads != 1)}"
    times = [np.asarray(one, dtype=float) for one in row.itl_samples_ms if one]
    every = np.concatenate(times)
    median, p95 = float(np.median(every)), float(np.percentile(every, 95))
    top = float(min(every.max(), np.percentile(every, 99.5) * 1.5))
    plot = Plot(
        Axis("token, all repetitions one after another", 0, float(max(every.size, 2))),
        Axis("ms a token", 0, top * 1.08),
        title=f"Token times: {name}",
        desc=f"{every.size} tokens, median {number(median)} ms, 95 % below {number(p95)} ms",
    )
    block = max(1, -(-every.size // _MOST_POINTS))  # tokens a point: the median of neighbours where there are many
    start = 0
    for i, one in enumerate(times):
        points = []
        for at in range(0, one.size, block):
            part = one[at : at + block]
            points.append((start + at + part.size / 2, min(float(np.median(part)), top)))
        plot.line(points, (4, 0)[i % 2])
        start += one.size
    caption = _caption(row, len(times), n_above=int(np.sum(every > top)))
    return name, Chart(plot.svg(), caption), _sensors(row, name)


def _sensors(row: SpeedRow, name: str) -> Chart | None:
    warm = [(r.t_s, r.temperature_c) for r in row.readings if r.temperature_c is not None]
    if len(warm) < 2 or warm[0][0] == warm[-1][0]:
        return None
    degrees = [value for _, value in warm]
    middle = (min(degrees) + max(degrees)) / 2
    half = max((max(degrees) - min(degrees)) / 2, 2.5)  # half a degree of noise must not look like a hill
    plot = Plot(
        Axis("seconds since the test began", min(0.0, warm[0][0]), warm[-1][0]),
        around("°C", [middle - half, middle + half]),
        title=f"Temperature: {name}",
        desc=f"from {number(degrees[0])} °C to {number(degrees[-1])} °C, at most {number(max(degrees))} °C",
    )
    plot.line(warm, 5)
    return Chart(plot.svg(), "The device's own sensors, about once a second.")


def _caption(row: SpeedRow, repetitions: int, n_above: int) -> str:
    parts = [
        f"{repetitions} repetition{'s' * (repetitions != 1)} of {row.test}, median {number(row.median_ts)} tokens/s"
    ]
    if row.itl_p50_ms is not None and row.itl_p95_ms is not None:
        parts.append(f"half of the tokens within {number(row.itl_p50_ms)} ms, 95 % within {number(row.itl_p95_ms)} ms")
    if row.temperature_c_max is not None:
        parts.append(f"at most {number(row.temperature_c_max)} °C")
    if row.slope_percent_per_min is not None and row.slowed:
        parts.append(f"it slowed by {number(-row.slope_percent_per_min)} % a minute")
    if row.throttled is not None:
        parts.append(f"throttled: {row.throttle_reason or 'yes'}" if row.throttled else "not throttled")
    if n_above:
        parts.append(f"{n_above} slower tokens are drawn at the upper edge")
    return "; ".join(parts) + "."

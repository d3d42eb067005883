"""Token by token: how long each took, and how warm the device was meanwhile.

The two are drawn below each other. Their clocks differ (tokens are counted over all repetitions,
sensors from the beginning of the test, warm-up included), so they do not share an axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arte_edge.publish.charts_axes import Axis, around, number
from arte_edge.publish.charts_plot import Plot
from arte_edge.results.rows import SpeedRow

__all__ = ["Trace", "trace_of", "traced"]

_MOST_TRACES = 6
_MOST_POINTS = 400  # more cannot be told apart in a chart of this width


@dataclass(frozen=True)
class Trace:
    """The charts of one test; `sensors` "" where the device told nothing."""

    name: str
    tokens: str
    sensors: str
    caption: str


def traced(rows: Sequence[SpeedRow]) -> list[SpeedRow]:
    """Return the tests to draw: of each file on each device the fastest that wrote tokens, and throttled ones."""
    writing = [row for row in rows if row.ok and row.n_gen and any(row.itl_samples_ms)]
    best: dict[tuple[str, str, bool], SpeedRow] = {}
    for row in writing:
        key = (row.model_filename, row.device.fingerprint, bool(row.throttled))
        if key not in best or row.median_ts > best[key].median_ts:
            best[key] = row
    return sorted(best.values(), key=lambda r: (r.model_filename, r.device.fingerprint))[:_MOST_TRACES]


def trace_of(row: SpeedRow) -> Trace:
    """Return the charts of one row that holds token times."""
    where = row.device.profile or row.device.cpu
    name = f"{row.model_filename} on {where}, {row.n_threads} thread{'s' * (row.n_threads != 1)}"
    times = [np.asarray(one, dtype=float) for one in row.itl_samples_ms if one]
    every = np.concatenate(times)
    top = float(min(every.max(), np.percentile(every, 99.5) * 1.5))
    plot = Plot(
        Axis("token, all repetitions one after another", 0, float(max(every.size, 2))),
        Axis("ms a token", 0, top * 1.08),
        title=f"Token times: {name}",
        desc=f"{every.size} tokens, median {number(float(np.median(every)))} ms, "
        f"95 % below {number(float(np.percentile(every, 95)))} ms",
    )
    start = 0
    for i, one in enumerate(times):
        points = _thin(one, start, every.size)
        plot.line([(x, min(y, top)) for x, y in points], (4, 0)[i % 2])
        start += one.size
    cut = int(np.sum(every > top))
    return Trace(name, plot.svg(), _sensors(row, name), _caption(row, len(times), cut))


def _thin(
    times: np.ndarray[tuple[int, ...], np.dtype[np.float64]], start: int, total: int
) -> list[tuple[float, float]]:
    """Return (token number, ms); where there are too many, medians of blocks of neighbours."""
    block = max(1, -(-total // _MOST_POINTS))
    return [
        (start + i + min(block, times.size - i) / 2, float(np.median(times[i : i + block])))
        for i in range(0, times.size, block)
    ]


def _sensors(row: SpeedRow, name: str) -> str:
    warm = [(r.t_s, r.temperature_c) for r in row.readings if r.temperature_c is not None]
    if len(warm) < 2 or warm[0][0] == warm[-1][0]:
        return ""
    degrees = [value for _, value in warm]
    middle = (min(degrees) + max(degrees)) / 2
    half = max((max(degrees) - min(degrees)) / 2, 2.5)  # half a degree of noise is no hill
    plot = Plot(
        Axis("seconds since the test began", min(0.0, warm[0][0]), warm[-1][0]),
        around("°C", [middle - half, middle + half]),
        title=f"Temperature: {name}",
        desc=f"from {number(degrees[0])} °C to {number(degrees[-1])} °C, at most {number(max(degrees))} °C",
    )
    plot.line(warm, 5)
    return plot.svg()


def _caption(row: SpeedRow, repetitions: int, cut: int) -> str:
    parts = [f"{repetitions} repetitions of {row.test}, median {number(row.median_ts)} tokens/s"]
    if row.itl_p50_ms is not None and row.itl_p95_ms is not None:
        parts.append(
            f"half of the tokens within {number(row.itl_p50_ms)} ms, 95 % within {number(row.itl_p95_ms)} ms"
        )
    if row.temperature_c_max is not None:
        parts.append(f"at most {number(row.temperature_c_max)} °C")
    if row.slope_percent_per_min is not None and row.slowed:
        parts.append(f"it slowed by {number(-row.slope_percent_per_min)} % a minute")
    if row.throttled is not None:
        said = row.throttle_reason or "yes"
        parts.append(f"throttled: {said}" if row.throttled else "not throttled")
    if cut:
        parts.append(f"{cut} slower tokens are drawn at the upper edge")
    return "; ".join(parts) + "."

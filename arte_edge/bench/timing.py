"""The clocks of a test: warm-up until the rate is steady, repetitions, and their statistics."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from arte_edge.bench.settings import Case
from arte_edge.runtimes.protocol import Decoder

__all__ = [
    "Meter",
    "Pace",
    "Timed",
    "Trend",
    "draw_tokens",
    "measure",
    "min_samples",
    "pace",
    "percentile",
    "spread",
    "trend",
]

_STEADY = 0.05  # coefficient of variation of the last three
_WARM_UPS = 10  # repetitions at most
_WARM_TOKENS = 16  # written in one warm-up
_SEED = 42
Say = Callable[[str, int, int], None]


class Meter(Protocol):
    """Energy between two moments; `arte_edge.bench.energy.EnergyMeter`."""

    def start(self) -> None: ...

    def stop(self) -> tuple[float | None, str]: ...


@dataclass
class Timed:
    """Every time that was taken.

    Attributes:
        samples_ns: one for each repetition that counts.
        token_ns: of writing, when it began and when each token was there: ``[repetition][n + 1]``.
        n_warmup: repetitions before the first that counts.
        energy_j: of the repetitions that count; None where nothing measures it.
    """

    samples_ns: list[int] = field(default_factory=list)
    token_ns: list[list[int]] = field(default_factory=list)
    n_warmup: int = 0
    energy_j: float | None = None
    energy_source: str = ""


def draw_tokens(n: int, n_vocab: int, bos: int | None) -> list[int]:
    """Return `n` ids inside the vocabulary, the same at every call; `bos` first if the model has one."""
    draw = random.Random(_SEED).random  # its sequence is promised to stay, across versions of Python
    tokens = [int(draw() * n_vocab) for _ in range(n)]
    if tokens and bos is not None:
        tokens[0] = bos
    return tokens


def measure(model: Decoder, case: Case, meter: Meter | None = None, say: Say | None = None) -> Timed:
    """Time the repetitions of `case` on a model that is open.

    Args:
        meter: started and stopped around each repetition that counts.
        say: called with what is being done, the number of the repetition, and how many there are.
    """
    tell = say or (lambda what, done, total: None)
    bos = model.facts.bos
    tokens = draw_tokens(case.n_prompt or case.n_gen, model.n_vocab, bos)
    depth = draw_tokens(case.n_depth, model.n_vocab, bos)
    timed = Timed()

    def begin() -> None:
        model.clear()
        if depth:
            model.prefill(depth)

    with _no_collection():
        if case.warmup:
            short = tokens if case.n_prompt else tokens[:_WARM_TOKENS]
            timed.n_warmup = _warm_up(model, short, bool(case.n_prompt), begin, case.warmup_s, tell)
        joules: list[float | None] = []
        ends = time.monotonic() + case.sustained_s
        while len(timed.samples_ns) < case.repetitions or time.monotonic() < ends:
            tell("repetition", len(timed.samples_ns) + 1, case.repetitions)
            begin()
            if meter is not None:
                meter.start()
            times = _read(model, tokens) if case.n_prompt else _write(model, tokens)
            if meter is not None:
                energy_j, timed.energy_source = meter.stop()
                joules.append(energy_j)
            timed.samples_ns.append(times[-1] - times[0])
            if case.n_gen:
                timed.token_ns.append(times)
    known = [value for value in joules if value is not None]
    if joules and len(known) == len(joules):
        timed.energy_j = sum(known)
    else:
        timed.energy_source = ""
    return timed


def _warm_up(
    model: Decoder,
    tokens: Sequence[int],
    reads: bool,
    begin: Callable[[], None],
    limit_s: float,
    tell: Say,
) -> int:
    """Repeat until the last three vary by less than 5 %, ten times or `limit_s` seconds at most."""
    ends = time.monotonic() + limit_s
    taken: list[int] = []
    while len(taken) < _WARM_UPS:
        tell("warm-up", len(taken) + 1, _WARM_UPS)
        begin()
        times = _read(model, tokens) if reads else _write(model, tokens)
        taken.append(times[-1] - times[0])
        if time.monotonic() >= ends or (len(taken) >= 3 and spread(taken[-3:]) < _STEADY):
            break
    return len(taken)


def _read(model: Decoder, tokens: Sequence[int]) -> list[int]:
    """Return when reading began and when the first token was known, in ns."""
    now = time.perf_counter_ns
    start = now()
    model.prefill(tokens)
    return [start, now()]


def _write(model: Decoder, tokens: Sequence[int]) -> list[int]:
    """Return when writing began and when each token was there, in ns: [n + 1]."""
    step, now = model.step, time.perf_counter_ns
    times = [now()]
    keep = times.append
    for token in tokens:
        step(token)
        keep(now())
    return times


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's cycle collector out of the measurement."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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

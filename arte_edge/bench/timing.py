"""The timing of a test: warm-up until the rate is steady, repetitions, their statistics, signs of throttling."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.bench.sensors import FREQUENCY_CAPPED, SOFT_LIMIT, STICKY_SHIFT, THROTTLED, UNDER_VOLTAGE, EnergyMeter
from arte_edge.bench.settings import Case
from arte_edge.device.contention import CpuMeter, contention
from arte_edge.results.rows import CpuUse, Reading
from arte_edge.runtimes.protocol import Decoder

_STEADY = 0.05  # coefficient of variation of the last three repetitions
_MAX_WARM_UPS = 10
_WARM_UP_TOKENS = 16  # generated in one warm-up
_SEED = 42
# Contended repetitions are discarded and done again after a pause, since other work often comes in bursts: at most so
# many a test, none after so many seconds of them.
_MOST_REPEATED = 3
_REPEATING_S = 60.0
_PAUSE_S = 0.25
OnProgress = Callable[[str, int, int], None]


@dataclass
class Timed:
    """All measured times, of the repetitions that count."""

    samples_ns: list[int] = field(default_factory=list)
    token_ns: list[list[int]] = field(default_factory=list)  # start and each token: [repetition][n + 1]
    cpu: list[CpuUse] = field(default_factory=list)
    n_warmup: int = 0  # repetitions before the first that counts
    n_repeated: int = 0  # that other work disturbed
    energy_j: float | None = None  # None where nothing measures it
    energy_source: str = ""


def draw_tokens(n: int, n_vocab: int, bos: int | None) -> list[int]:
    """Return `n` ids inside the vocabulary, the same at every call; `bos` first if the model has one."""
    draw = random.Random(_SEED).random  # Python guarantees the same sequence across versions
    tokens = [int(draw() * n_vocab) for _ in range(n)]
    if tokens and bos is not None:
        tokens[0] = bos
    return tokens


def measure(
    model: Decoder,
    case: Case,
    meter: EnergyMeter | None = None,
    on_progress: OnProgress | None = None,
    cpu: CpuMeter | None = None,
) -> Timed:
    """Time the repetitions of `case` on an open model.

    Args:
        meter: started and stopped around each counted repetition.
        on_progress: called with the activity, the number of the repetition, and the total.
        cpu: likewise; a repetition that other work disturbed is done again, within limits.
    """
    report = on_progress or (lambda what, done, total: None)
    run = _prefill if case.n_prompt else _decode
    bos = model.facts.bos
    tokens = draw_tokens(case.n_prompt or case.n_gen, model.n_vocab, bos)
    depth = draw_tokens(case.n_depth, model.n_vocab, bos)
    timed = Timed()

    def begin() -> None:
        model.clear()
        if depth:
            model.prefill(depth)

    with _no_garbage_collection():
        if case.warmup:  # until the last three vary by less than 5 %, or a limit is reached
            ends = time.monotonic() + case.warmup_s
            warm_ns: list[int] = []
            while len(warm_ns) < _MAX_WARM_UPS:
                report("warm-up", len(warm_ns) + 1, _MAX_WARM_UPS)
                begin()
                times = run(model, tokens if case.n_prompt else tokens[:_WARM_UP_TOKENS])
                warm_ns.append(times[-1] - times[0])
                steady = len(warm_ns) >= 3 and spread(warm_ns[-3:]) < _STEADY
                if steady or time.monotonic() >= ends:
                    break
            timed.n_warmup = len(warm_ns)
        joules: list[float | None] = []
        discarded_s = 0.0
        ends = time.monotonic() + case.sustained_s
        while len(timed.samples_ns) < case.repetitions or time.monotonic() < ends:
            report("repetition", len(timed.samples_ns) + 1, case.repetitions)
            begin()
            if meter is not None:
                meter.start()
            if cpu is not None:
                cpu.start()
            times = run(model, tokens)
            uses = [cpu.stop()] if cpu is not None else []
            energy_j, timed.energy_source = meter.stop() if meter is not None else (None, "")
            may_repeat = timed.n_repeated < _MOST_REPEATED and discarded_s < _REPEATING_S
            if may_repeat and contention(uses, case.threads)[0]:
                timed.n_repeated += 1
                discarded_s += (times[-1] - times[0]) / 1e9
                report("waiting for other work", timed.n_repeated, _MOST_REPEATED)
                time.sleep(_PAUSE_S)
                continue
            joules.append(energy_j)
            timed.cpu += uses
            timed.samples_ns.append(times[-1] - times[0])
            if case.n_gen:
                timed.token_ns.append(times)
    known = [value for value in joules if value is not None]
    if len(known) == len(joules):
        timed.energy_j = sum(known)
    else:
        timed.energy_source = ""
    return timed


def _prefill(model: Decoder, tokens: Sequence[int]) -> list[int]:
    """Return the time of the start and of the first logits, in ns."""
    now = time.perf_counter_ns
    start = now()
    model.prefill(tokens)
    return [start, now()]


def _decode(model: Decoder, tokens: Sequence[int]) -> list[int]:
    """Return the time of the start and of each token, in ns: [n + 1]."""
    step, now = model.step, time.perf_counter_ns
    times = [now()]
    append = times.append
    for token in tokens:
        step(token)
        append(now())
    return times


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
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
_SHORTEST_S = 5.0  # a shorter test does not heat the device up
_BURST_S = 10.0
_SIGNIFICANCE = 0.01
_RELEVANT_LOSS = 0.05  # of the rate, from the first bin to the last


@dataclass(frozen=True)
class Trend:
    """How the rate changed during a test. `slowed`: it fell significantly and by more than 5 %."""

    slope_percent_per_min: float
    p_value: float
    slowed: bool


@dataclass(frozen=True)
class Pace:
    """Tokens per second at the beginning of a test and in its last third."""

    burst_ts: float
    sustained_ts: float


def spread(values: Sequence[float]) -> float:
    """Return the coefficient of variation: sample standard deviation over mean, 0 for fewer than two."""
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else 0.0


def min_samples(share: float) -> int:
    """Return the smallest number of samples for which the percentile `share` is reported.

    The smallest n for which at most one sample above the true percentile has a probability under 1 %:
    ``share**n + n (1 - share) share**(n - 1) < 0.01`` (MLPerf Inference rules, appendix on early stopping).
    """
    n = 2
    while share**n + n * (1 - share) * share ** (n - 1) >= 1 - _CONFIDENCE:
        n += 1
    return n


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the percentile (0.95 for the 95th), None for too few samples; the median for any number."""
    if not values or (share > 0.5 and len(values) < min_samples(share)):
        return None
    return float(np.quantile(np.asarray(values, dtype=np.float64), share))


def pace(token_ns: Sequence[Sequence[int]]) -> Pace | None:
    """Return the rates at the beginning and at the end, None for fewer than three tokens.

    The beginning is the first ten seconds, or the first third of a test shorter than thirty.
    """
    rows = _seconds(token_ns)
    times_s = np.concatenate(rows) if rows else np.empty(0)
    ends = np.cumsum(times_s)  # without the time between repetitions
    if len(ends) < 3:
        return None
    total = float(ends[-1])
    n_first = max(1, int(np.searchsorted(ends, min(_BURST_S, total / 3), side="right")))
    start = min(int(np.searchsorted(ends, total * 2 / 3, side="right")), len(ends) - 1)
    return Pace(n_first / float(ends[n_first - 1]), (len(ends) - start) / float(times_s[start:].sum()))


def trend(token_ns: Sequence[Sequence[int]]) -> Trend | None:
    """Return how the rate changed (`token_ns`: ``[repetition][n + 1]``), None if the test is too short."""
    rows = _seconds(token_ns)
    n_all = sum(map(len, rows))
    if len(rows) < 3 or n_all < _FEWEST_TOKENS:
        return None
    width = max(map(len, rows))
    table = np.full((len(rows), width), np.nan)
    for row, times in zip(table, rows, strict=True):
        row[: len(times)] = times
    usual = np.nanmedian(table, axis=0)  # by position in the sequence
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
    slope = _theil_sen(when, rate)  # of the relative rate, per second
    p_value = _mann_kendall_falls(rate)
    lost = -slope * (when[-1] - when[0])
    return Trend(slope * 60 * 100, p_value, bool(p_value < _SIGNIFICANCE and lost > _RELEVANT_LOSS))


def _seconds(token_ns: Sequence[Sequence[int]]) -> list[NDArray[np.float64]]:
    """Return the seconds per token: ``[repetition][n]``."""
    return [np.diff(np.asarray(times, dtype=np.float64)) / 1e9 for times in token_ns]


def _theil_sen(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return the median slope over all pairs of points."""
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])))


def _mann_kendall_falls(values: NDArray[np.float64]) -> float:
    """Return the one-sided p-value of the Mann-Kendall test for a falling series.

    Normal approximation with continuity correction (Kendall 1975); for eight points its error is below 0.002.
    """
    n = len(values)
    i, j = np.triu_indices(n, 1)
    score = float(np.sign(values[j] - values[i]).sum())
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    corrected = score + 1 if score < 0 else score - 1 if score > 0 else 0.0
    return 0.5 * math.erfc(-corrected / deviation / math.sqrt(2))


_REASONS = (
    (UNDER_VOLTAGE, "under-voltage: use the official power supply and a short cable"),
    (THROTTLED, "too hot, throttled: cool it, or let it rest between tests"),
    (SOFT_LIMIT, "soft temperature limit reached: cool it, or let it rest between tests"),
    (FREQUENCY_CAPPED, "clock capped by the firmware: check supply and cooling"),
)
_LIMIT_C = 80.0  # default: a Raspberry Pi's first limit
_NEAR_C = 5.0
_CLOCK_DROP = 0.9  # below this share of its highest clock a machine was throttled
_FEWEST_READINGS = 6  # two in the last third


def judge(
    before: int | None, readings: Sequence[Reading], after: int | None, limit_c: float | None = None
) -> tuple[bool | None, str]:
    """Return whether the machine was throttled, and the reasons; None if its sensors cannot tell.

    Three things count: a bit that was set in one of the readings, a bit "since boot" that was set between
    `before` and `after` (which catches throttling between two readings), and a clock whose maximum in the last
    third of the test is 10 % below its maximum in the first half while the temperature was within 5 °C of its
    limit. Maximum and not mean, because a core that waits for the disk clocks down as well.

    Args:
        before: throttle bits before the test, None if this machine has none.
        readings: the sensors during it, in order.
        after: the bits after it.
        limit_c: temperature from which this machine lowers its clock; None: 80 °C.
    """
    live = [reading.throttle_bits for reading in readings if reading.throttle_bits is not None]
    bits = 0
    for value in live:
        bits |= value & 0xF
    if before is not None and after is not None:
        bits |= (after & ~before) >> STICKY_SHIFT & 0xF
    reasons = [reason for bit, reason in _REASONS if bits & bit]
    heat = _hot_and_slower(readings, _LIMIT_C if limit_c is None else limit_c)
    if heat and not reasons:
        reasons.append(heat)
    if reasons:
        return True, "; ".join(reasons)
    known = bool(live) or (before is not None and after is not None) or heat is not None
    return (False, "") if known else (None, "")


def _hot_and_slower(readings: Sequence[Reading], limit_c: float) -> str | None:
    """Return a description of thermal throttling, empty if there was none, None without enough readings."""
    known = [(r.clock_mhz, r.temperature_c) for r in readings]
    clocks = [clock for clock, heat in known if clock is not None and heat is not None]
    if len(clocks) < _FEWEST_READINGS:
        return None
    hottest = max(heat for clock, heat in known if clock is not None and heat is not None)
    best, last = max(clocks[: -(-len(clocks) // 2)]), max(clocks[-(-2 * len(clocks) // 3) :])
    if last >= _CLOCK_DROP * best or hottest < limit_c - _NEAR_C:
        return ""
    return f"clock fell from {best:.0f} to {last:.0f} MHz at {hottest:.0f} °C: cool it, or let it rest between tests"


def metrics(case: Case, timed: Timed) -> dict[str, Any]:
    """Return rates, percentiles and trend of the measured times, as fields of a `SpeedRow`."""
    n_tokens = case.n_prompt or case.n_gen
    samples_ts = [n_tokens * 1e9 / max(ns, 1) for ns in timed.samples_ns]
    several = len(samples_ts) > 1
    contended, reason = contention(timed.cpu, case.threads)
    found: dict[str, Any] = {
        "n_warmup": timed.n_warmup,
        "avg_ns": round(statistics.fmean(timed.samples_ns)),
        "stddev_ns": round(statistics.stdev(timed.samples_ns)) if several else 0,
        "avg_ts": statistics.fmean(samples_ts),
        "stddev_ts": statistics.stdev(samples_ts) if several else 0.0,
        "samples_ns": timed.samples_ns,
        "samples_ts": [round(rate, 4) for rate in samples_ts],
        "median_ts": statistics.median(samples_ts),
        "cv": spread(samples_ts),
        "energy_j": timed.energy_j,
        "energy_source": timed.energy_source,
        "cpu": [use.model_dump() for use in timed.cpu],
        "contended": contended,
        "contended_reason": reason,
        "n_repeated": timed.n_repeated,
    }
    if case.n_prompt:
        ttft_ms = [round(ns / 1e6, 6) for ns in timed.samples_ns]
        return found | {"ttft_ms": statistics.median(ttft_ms), "ttft_samples_ms": ttft_ms}
    itl_ms = [[(b - a) / 1e6 for a, b in pairwise(times)] for times in timed.token_ns]
    everything = [value for row in itl_ms for value in row]
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
        found[f"itl_{name}_ms"] = percentile(everything, share)
    found["itl_samples_ms"] = [[round(value, 4) for value in row] for row in itl_ms]
    if (rates := pace(timed.token_ns)) is not None:
        found |= {"burst_ts": rates.burst_ts, "sustained_ts": rates.sustained_ts}
    if (change := trend(timed.token_ns)) is not None:
        found |= {"slope_percent_per_min": change.slope_percent_per_min, "slowed": change.slowed}
    return found

"""The clock: what is inside of it and what is not.

Reading (``pp``): the clock runs while the prompt goes in and stops when the first token is known, so
a repetition's time is also its time to first token. Writing (``tg``): the clock is read after every
token. Emptying the cache and filling it to the wanted depth is outside, so is choosing a token: the
ids are drawn beforehand, as llama-bench does, from the vocabulary at random, always the same ones.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from arte_edge.bench.case import Case
from arte_edge.bench.runtime import SpeedModel
from arte_edge.bench.steady import spread

__all__ = ["Meter", "Timed", "draw_tokens", "measure"]

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


def measure(model: SpeedModel, case: Case, meter: Meter | None = None, say: Say | None = None) -> Timed:
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
            model.read(depth)

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
    model: SpeedModel,
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


def _read(model: SpeedModel, tokens: Sequence[int]) -> list[int]:
    """Return when reading began and when the first token was known, in ns."""
    now = time.perf_counter_ns
    start = now()
    model.read(tokens)
    return [start, now()]


def _write(model: SpeedModel, tokens: Sequence[int]) -> list[int]:
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

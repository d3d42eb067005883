"""Percentiles appear from the sample counts of MLPerf on, and slowing down is seen and not imagined."""

from __future__ import annotations

import numpy as np
import pytest

from arte_edge.bench.steady import min_samples, pace, percentile, spread, trend


def runs(tokens_s: np.ndarray, n_gen: int) -> list[list[int]]:
    """Return time stamps of repetitions of `n_gen` tokens, half a second of something else between them."""
    stamps, now = [], 0.0
    for start in range(0, len(tokens_s), n_gen):
        times = [now]
        for token_s in tokens_s[start : start + n_gen]:
            now += float(token_s)
            times.append(now)
        stamps.append([round(t * 1e9) for t in times])
        now += 0.5
    return stamps


def test_percentiles_need_as_many_samples_as_mlperf_asks_for() -> None:
    assert (min_samples(0.9), min_samples(0.99)) == (64, 662)
    assert percentile(range(63), 0.9) is None
    assert percentile(range(64), 0.9) == pytest.approx(56.7)
    assert percentile(range(661), 0.99) is None
    assert percentile(range(662), 0.99) is not None
    assert percentile([3.0], 0.5) == 3.0
    assert percentile([], 0.5) is None


def test_spread_is_the_sample_deviation_over_the_mean() -> None:
    assert spread([9.0, 10.0, 11.0]) == pytest.approx(0.1)
    assert spread([7.0]) == 0.0


def test_a_machine_that_loses_a_fifth_has_slowed_down_and_the_slope_says_how_fast() -> None:
    rng = np.random.default_rng(0)
    n = 3000  # about a minute
    tokens = 0.02 * np.linspace(1.0, 1.25, n) * rng.lognormal(0, 0.1, n)
    found = trend(runs(tokens, 100))
    assert found is not None and found.slowed
    minutes = tokens.sum() / 60
    assert found.slope_percent_per_min * minutes == pytest.approx(-21, abs=6)
    rates = pace(runs(tokens, 100))
    assert rates is not None and rates.sustained_ts < 0.9 * rates.burst_ts


def test_noise_pauses_and_a_growing_context_are_not_slowing_down() -> None:
    false_alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        tokens = 0.02 * rng.lognormal(0, 0.2, 1280)
        tokens *= np.tile(np.linspace(1.0, 1.5, 128), 10)  # the cache fills up in each repetition
        tokens[rng.integers(0, 1280, 12)] += 0.3  # somebody else's turn
        found = trend(runs(tokens, 128))
        assert found is not None
        false_alarms += found.slowed
    assert false_alarms <= 1


def test_a_test_too_short_to_warm_anything_has_no_trend() -> None:
    assert trend(runs(np.full(300, 0.01), 100)) is None  # 3 s
    assert trend(runs(np.full(300, 0.1), 300)) is None  # one repetition: nothing to compare positions with
    assert trend([]) is None


def test_burst_and_sustained_are_of_the_first_and_the_last_third() -> None:
    tokens = np.concatenate([np.full(100, 0.01), np.full(100, 0.01), np.full(50, 0.02)])  # 1 s, 1 s, 1 s
    rates = pace(runs(tokens, 50))
    assert rates is not None
    assert rates.burst_ts == pytest.approx(100, rel=0.02)
    assert rates.sustained_ts == pytest.approx(50, rel=0.04)
    assert pace([[0, 1]]) is None

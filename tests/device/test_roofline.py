"""Predicted speed: against published rows and against arithmetic.

The memory probe: plausible, short, kept per machine, and lost without harm.
"""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import roofline as script
from tiny import Patch, model_shape

from arte_edge.device import roofline
from arte_edge.device.memory_estimate import fit_profile
from arte_edge.device.model_size import ModelSize
from arte_edge.device.profiles import Fact, find_device
from arte_edge.device.roofline import expected, expected_here, predict


def shape(**sizes: Any) -> ModelSize:
    weights = {"weight_bytes": 10**9, "token_bytes": 10**9, "n_layer": 20, "kv_values": 5000}
    return model_shape(**weights | {"token_bytes_by_type": {"Q8_0": 6 * 10**8, "Q4_K": 4 * 10**8}} | sizes)


def test_the_eight_published_rows_of_a_raspberry_pi_5_are_met_within_20_percent() -> None:
    rows = [row for row in script.compare_published() if row["fitted"]]
    assert len(rows) == 8
    for row in rows:
        assert abs(row["error"]) <= 0.2, row["model"]
        assert abs(row["error_left_out"]) <= 0.2, f"{row['model']}, with a bandwidth that never saw it"
        assert row["source"]


def test_the_profile_holds_the_bandwidth_that_the_rows_give() -> None:
    fitted = script.fitted_bandwidth([row for row in script.published_rows() if row["fitted"]])
    fact = find_device("raspberry-pi-5").effective_bandwidth
    assert fact and fact.value == pytest.approx(fitted, rel=0.01)


def test_a_profile_is_published_or_assumed_and_never_a_probe() -> None:
    pi5 = find_device("raspberry-pi-5")
    told = expected(shape(), pi5)
    assert told is not None and told.source == "published" and "10.7 GB/s, derived" in told.basis
    fast = replace(shape(), n_layer=0)
    slower = pi5.model_copy(update={"token_overhead_s": Fact(value=0.1, evidence="assumed", source="made up")})
    assert expected(fast, pi5).decode_tokens_per_s == pytest.approx(10.7, rel=1e-3)  # type: ignore[union-attr]
    assert expected(shape(), slower).overhead_s == pytest.approx(0.1)  # type: ignore[union-attr]
    on_paper = pi5.model_copy(update={"effective_bandwidth": None})
    told = expected(shape(), on_paper)
    assert told is not None and told.source == "assumed" and "17.1 GB/s" in told.basis
    assert expected(shape(), on_paper.model_copy(update={"peak_bandwidth": None})) is None


def test_the_memory_of_a_prediction_is_that_of_the_estimate_for_the_device() -> None:
    pi5, size = find_device("raspberry-pi-5"), shape()
    found = fit_profile(size, pi5, 512)
    assert found.copy_bytes == 10**9, "llama.cpp repacks Q8_0 there, unlike on x86"
    assert predict(size, pi5, 512).ram_bytes == found.peak_bytes


def test_the_bandwidth_of_this_machine_gives_an_upper_bound(monkeypatch: Patch) -> None:
    monkeypatch.setattr("arte_edge.device.roofline.bandwidth", lambda threads: threads * 8e9)
    found = expected_here(shape(), 2, context_tokens=1000)
    assert found == expected(shape(), 16e9, context_tokens=1000)
    assert found.is_upper_bound and found.source == "probe" and "16.0 GB/s" in found.basis
    assert found.weights_s == pytest.approx(1e9 / 16e9)
    assert found.kv_s == pytest.approx(1000 * 5000 * 2 / 16e9)
    assert found.decode_tokens_per_s == pytest.approx(1 / (found.weights_s + found.kv_s + found.overhead_s))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: Patch) -> None:
    """A machine with nothing else to do, whatever runs beside the tests."""
    monkeypatch.setattr(roofline, "is_busy", lambda: False)


def test_the_probe_reads_at_a_rate_that_memory_can_have_and_is_short(monkeypatch: Patch) -> None:
    monkeypatch.setattr(roofline, "_MAX_BYTES", 64_000_000)
    start = time.perf_counter()
    rate = roofline.measure_bandwidth(1)
    assert 2e8 < rate < 1e12
    assert time.perf_counter() - start < 5


def test_a_probe_is_kept_until_a_fresh_one_is_requested(model_cache: Path, monkeypatch: Patch) -> None:
    rates = iter([1e9, 2e9, 3e9])
    monkeypatch.setattr(roofline, "measure_bandwidth", lambda threads: next(rates))
    assert [roofline.bandwidth(2), roofline.bandwidth(2), roofline.bandwidth(1)] == [1e9, 1e9, 2e9]
    assert roofline.bandwidth(2, fresh=True) == 3e9
    assert roofline.bandwidth(2) == 3e9
    other = SimpleNamespace(fingerprint="another machine")
    monkeypatch.setattr("arte_edge.device.detect.detect", lambda: other)
    monkeypatch.setattr(roofline, "measure_bandwidth", lambda threads: 5e9)
    assert roofline.bandwidth(2) == 5e9


@pytest.mark.parametrize("content", ["", "[]", '{"x": ', '{"x": 3}', '{"bytes_per_s": "fast"}'])
def test_a_damaged_or_unwritable_cache_is_no_error(model_cache: Path, monkeypatch: Patch, content: str) -> None:
    monkeypatch.setattr(roofline, "measure_bandwidth", lambda threads: 4e9)
    roofline.bandwidth(2)
    [stored] = (model_cache / "bandwidths").iterdir()
    stored.write_text(content)
    assert roofline.bandwidth(2) == 4e9
    monkeypatch.setenv("ARTE_EDGE_HOME", "/proc/nowhere")
    assert roofline.bandwidth(2) == 4e9


def test_what_was_measured_on_a_busy_machine_is_not_kept(model_cache: Path, monkeypatch: Patch) -> None:
    rates = iter([1e9, 2e9])
    monkeypatch.setattr(roofline, "measure_bandwidth", lambda threads: next(rates))
    monkeypatch.setattr(roofline, "is_busy", lambda: True)
    assert roofline.bandwidth(2) == 1e9
    monkeypatch.setattr(roofline, "is_busy", lambda: False)
    assert [roofline.bandwidth(2), roofline.bandwidth(2)] == [2e9, 2e9]

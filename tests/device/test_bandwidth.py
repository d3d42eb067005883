"""The memory probe: plausible, short, kept per machine, and lost without harm."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from arte_edge.device import bandwidth


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with nothing else to do, whatever runs beside the tests."""
    monkeypatch.setattr(bandwidth, "is_busy", lambda: False)


def test_the_probe_reads_at_a_rate_that_memory_can_have_and_is_short() -> None:
    start = time.perf_counter()
    rate = bandwidth.measure(1, 64_000_000)
    assert 2e8 < rate < 1e12
    assert time.perf_counter() - start < 5


def test_a_probe_is_kept_under_this_machine_and_made_again_when_asked(
    model_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([1e9, 2e9, 3e9])
    monkeypatch.setattr(bandwidth, "measure", lambda threads: next(rates))
    assert [bandwidth.probe(2), bandwidth.probe(2), bandwidth.probe(1)] == [1e9, 1e9, 2e9]
    assert bandwidth.probe(2, fresh=True) == 3e9
    assert bandwidth.probe(2) == 3e9
    monkeypatch.setattr(
        "arte_edge.device.detect.detect", lambda: SimpleNamespace(fingerprint="another machine")
    )
    monkeypatch.setattr(bandwidth, "measure", lambda threads: 5e9)
    assert bandwidth.probe(2) == 5e9


@pytest.mark.parametrize("content", ["", "[]", '{"x": ', '{"x": 3}', '{"bytes_per_s": "fast"}'])
def test_a_damaged_or_unwritable_memory_of_probes_is_no_error(
    model_cache: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(bandwidth, "measure", lambda threads: 4e9)
    bandwidth.probe(2)
    [stored] = (model_cache / "bandwidths").iterdir()
    stored.write_text(content)
    assert bandwidth.probe(2) == 4e9
    monkeypatch.setenv("ARTE_EDGE_HOME", "/proc/nowhere")
    assert bandwidth.probe(2) == 4e9


def test_what_was_measured_on_a_busy_machine_is_not_kept(
    model_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([1e9, 2e9])
    monkeypatch.setattr(bandwidth, "measure", lambda threads: next(rates))
    monkeypatch.setattr(bandwidth, "is_busy", lambda: True)
    assert bandwidth.probe(2) == 1e9
    monkeypatch.setattr(bandwidth, "is_busy", lambda: False)
    assert [bandwidth.probe(2), bandwidth.probe(2)] == [2e9, 2e9]

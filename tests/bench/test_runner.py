"""One child a case: what is measured comes back whole, what fails becomes a row, and the sweep goes on."""

import os
import platform
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from tiny import Patch, facts

from arte_edge.bench.runner import run_bench
from arte_edge.bench.settings import BenchSettings, Reporter
from arte_edge.errors import InputError
from arte_edge.results.rows import SpeedRow

QUICK = BenchSettings(n_prompt=(16,), n_gen=(80,), repetitions=3, warmup_s=1, threads=(1,), roofline=False)


def bench(paths: list[Path], settings: BenchSettings) -> list[SpeedRow]:
    seen: list[SpeedRow] = []
    rows = run_bench(
        paths, settings, device=facts(profile="", arch=platform.machine()), reporter=Reporter(), on_row=seen.append
    )
    assert rows == seen
    return rows


def test_a_gguf_is_measured_with_everything_a_row_promises(bench_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    reads, writes = bench([bench_gguf], QUICK)
    assert (reads.status, writes.status) == ("ok", "ok"), (reads.reason, writes.reason)
    assert (reads.test, writes.test) == ("pp16", "tg80")
    assert reads.model_type == "llama" and reads.quantization == "F16" and reads.format == "gguf"
    assert reads.model_size == bench_gguf.stat().st_size
    assert len(reads.sha256) == len(reads.tensor_sha256) == 64 and reads.sha256 != reads.tensor_sha256
    assert reads.runtime.startswith("llama_cpp ") and "CPU" in reads.build
    assert (reads.n_batch, reads.n_ubatch, reads.type_k, reads.flash_attn) == (2048, 512, "f16", True)
    assert reads.use_mmap is True
    assert len(reads.samples_ns) == 3 and reads.n_warmup >= 1
    assert reads.ttft_ms == pytest.approx(sorted(reads.samples_ns)[1] / 1e6)
    assert reads.samples_ts[0] == pytest.approx(16e9 / reads.samples_ns[0], rel=1e-3)
    assert reads.itl_p50_ms is None and writes.ttft_ms is None
    assert [len(one) for one in writes.itl_samples_ms] == [80] * 3
    assert writes.itl_p50_ms and writes.itl_p90_ms and writes.itl_p95_ms
    assert writes.itl_p99_ms is None, "240 tokens are too few"
    for row in (reads, writes):
        assert row.load_ms and row.peak_rss_bytes and row.peak_rss_bytes > row.model_size
        assert row.mapped_bytes is None or row.mapped_bytes > 0
        assert row.readings and row.test_time.endswith("Z")
        assert len(row.cpu) == 3 and row.contended in (True, False) and row.cpu[0].run_share > 0
    text = writes.model_dump_json()
    assert str(bench_gguf.parent) not in text, "nothing of this machine's folders is in a row"


def test_a_child_that_is_killed_is_a_row_and_the_next_case_runs() -> None:
    def kill_the_first() -> None:
        ends = time.monotonic() + 20
        while time.monotonic() < ends:
            found = [c for c in psutil.Process().children() if "arte_edge.bench.worker" in " ".join(c.cmdline())]
            if found:
                os.kill(found[0].pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    settings = QUICK.model_copy(update={"n_prompt": (16, 8), "n_gen": (0,), "warmup": False})
    killer = threading.Thread(target=kill_the_first)
    killer.start()
    first, second = bench([Path("null:50")], settings)
    killer.join()
    assert first.status == "crashed" and "Killed" in first.reason
    assert second.status == "ok" and second.median_ts == pytest.approx(20, rel=0.1)


def test_what_does_not_fit_is_refused_before_it_is_opened(bench_gguf: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("arte_edge.machine.available_bytes", lambda *root: 1_000_000)
    rows = bench([bench_gguf], QUICK)
    assert [row.status for row in rows] == ["refused", "refused"]
    assert "does not fit" in rows[0].reason


def test_a_runtime_that_says_no_is_a_row(bench_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    settings = QUICK.model_copy(update={"n_gen": (0,), "runtime": "xllamacpp", "type_k": ("q8_0",)})
    (row,) = bench([bench_gguf], settings)
    assert row.status == "refused" and "cache types" in row.reason


def test_a_damaged_file_and_a_wrong_runtime_are_errors(bench_gguf: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(bench_gguf.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"short\.gguf"):
        bench([Path("null"), short], QUICK)
    with pytest.raises(InputError, match="does not run gguf"):
        bench([bench_gguf], QUICK.model_copy(update={"runtime": "onnxruntime"}))


def test_depth_is_filled_before_the_clock_starts(bench_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    settings = QUICK.model_copy(update={"n_prompt": (8,), "n_gen": (8,), "n_depth": (64,)})
    rows = bench([bench_gguf], settings)
    assert [(row.test, row.status) for row in rows] == [("pp8@d64", "ok"), ("tg8@d64", "ok")]
    assert [row.n_depth for row in rows] == [64, 64]

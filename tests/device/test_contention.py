"""Other work on the cores is noticed by what the kernel reports of it, and by nothing else."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import Patch, machine

from arte_edge.device.contention import CpuMeter, contention
from arte_edge.results.rows import CpuUse

BUSY = "close it and run the same command again"


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: Patch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 4 if logical else 2)


def use(wall_s: float = 0.5, **more: Any) -> CpuUse:
    quiet = {"run_share": 1.0, "wait_share": 0.002, "others_cores": 0.02, "steal_share": 0.0, "quota_share": 0.0}
    return CpuUse(wall_s=wall_s, **quiet | more)


@pytest.mark.parametrize(
    ("uses", "threads", "words"),
    [
        ([use()] * 3, 2, ""),
        ([use(run_share=0.1)], 2, ""),  # a runtime that sleeps is not held up
        ([use(wait_share=0.4)] * 2, 2, f"waited 40% of the time for a core); {BUSY}"),
        ([use(others_cores=1.0)], 2, f"other processes used 1.0 cores); {BUSY}"),
        ([use(others_cores=1.0)], 1, ""),  # one core was free
        ([use(others_cores=1.9)], 1, "used 1.9 cores"),
        ([use(others_cores=0.9, wall_s=0.04)], 2, ""),  # a tick or two
        ([use(wait_share=0.5, wall_s=0.003)], 1, ""),  # a thread that woke up late
        ([use(steal_share=0.3)], 2, "hypervisor took the cores for 30% of the time"),
        ([use(quota_share=0.5, wait_share=0.5)], 2, "CPU limit stopped the threads for 50%"),
        ([*[use()] * 99, use(wait_share=0.9)], 2, ""),  # the median of a hundred does not move
        ([*[use()] * 4, use(wait_share=0.9)], 2, "waited 18%"),
    ],
)
def test_what_held_the_cores_is_named_with_what_to_do(uses: list[CpuUse], threads: int, words: str) -> None:
    contended, reason = contention(uses, threads)
    assert contended is bool(words) and words in reason and bool(reason) == bool(words)


def test_a_system_that_reports_nothing_gets_no_verdict() -> None:
    assert contention([], 1) == (None, "")
    assert contention([CpuUse(wall_s=1, run_share=0.5)], 1) == (None, "")
    assert contention([CpuUse(wall_s=1, run_share=0.5, others_cores=0.0)], 1) == (False, "")


def test_the_kernels_counters_become_shares(tmp_path: Path, monkeypatch: Patch) -> None:
    cpu, task = "sys/fs/cgroup/box/cpu.stat", "proc/self/task"

    def write(waits_ms: dict[int, int], stopped_ms: int) -> None:
        files = {f"{task}/{thread}/schedstat": f"5 {ms}000000 3" for thread, ms in waits_ms.items()}
        files |= {"proc/self/cgroup": "0::/box", cpu: f"nr_throttled 1\nthrottled_usec {stopped_ms}000"}
        machine(tmp_path, files)

    clock = iter((10.0, 11.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    write({1: 500, 2: 0}, 100)
    meter = CpuMeter(1, tmp_path)
    meter.start()
    write({1: 510, 2: 300, 3: 20}, 500)  # one more thread
    (tmp_path / task / "1/schedstat").write_text("nonsense")
    found = meter.stop()
    assert (found.wall_s, found.wait_share, found.quota_share) == (1.0, 0.3, 0.4)
    monkeypatch.undo()
    empty = CpuMeter(2, tmp_path / "nothing")
    empty.start()
    assert empty.stop().wait_share is empty.stop().quota_share is None


@pytest.fixture
def competitor() -> Iterator[None]:
    """A process that is busy on the one core that this one may use."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield
    process.kill()
    process.communicate()
    os.sched_setaffinity(0, before)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="a kernel without it")
def test_a_real_competing_process_is_noticed_each_time(competitor: None) -> None:
    meter = CpuMeter(1)
    for _ in range(5):
        meter.start()
        ends = time.perf_counter() + 0.1
        while time.perf_counter() < ends:
            pass
        found = meter.stop()
        assert contention([found], 1)[0] is True, found
        assert 0.2 < found.wait_share < 1 and found.run_share < 0.8

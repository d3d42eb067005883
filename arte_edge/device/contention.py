"""Whether other work held the cores while something was timed.

llama.cpp's threads spin at a barrier until the last of them arrives: where another process holds one core, the rate
falls to a fraction while the benchmark's own CPU time still looks busy. So four things are read around each timed
repetition, as shares of its time: run-queue wait (a thread is ready but has no core: ``schedstat``, Linux), the cores
that other processes used beyond the free ones (psutil), the time that a hypervisor took (steal), and the time that a
container's limit stopped the threads (``cpu.stat``). What a system does not report is None.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from arte_edge.machine import available_cores, cgroup_files
from arte_edge.results.rows import CpuUse

# Half a percent and less on a quiet machine, 25 to 80 % with one competing process a core
# (benchmarks/contention.py); the rate falls by at least the share.
_MOST_SHARE = 0.05
_MOST_OTHERS = 0.25  # cores beyond the free ones; two threads of one core share its arithmetic units
_LEAST_S = 0.05  # five ticks, in which the kernel counts all but run-queue wait
_LEAST_WAIT_S = 0.002  # waking up alone takes some 50 µs


class CpuMeter:
    """Measures how the cores were used between `start` and `stop` by work of so many threads. Reusable."""

    def __init__(self, threads: int, root: Path = Path("/")) -> None:
        self._threads, self._tasks = threads, root / "proc/self/task"
        self._groups = cgroup_files(root, "cpu", "cpu.stat", "cpu.stat")
        self._before: dict[str, float] = {}

    def start(self) -> None:
        self._before = self._read()

    def stop(self) -> CpuUse:
        """Return the use since `start`."""
        passed = {key: value - self._before.get(key, 0.0) for key, value in self._read().items()}
        wall_s = max(passed["clock"], 1e-9)

        def share(key: str) -> float | None:
            return round(passed[key] / wall_s / self._threads, 5) if key in passed else None

        waits = [value for key, value in passed.items() if key.startswith("thread ")]
        if self._threads > available_cores():  # they wait for each other
            waits = []
        others_s = max(passed["busy"] - passed["own"], 0.0)
        counts = passed["busy"] > 0 or passed["own"] < _LEAST_S  # gVisor has a /proc/stat of zeros
        return CpuUse(
            wall_s=round(wall_s, 6),
            run_share=share("own") or 0.0,
            wait_share=round(max(waits) / wall_s, 5) if waits else None,
            others_cores=round(others_s / wall_s, 5) if counts else None,
            steal_share=share("steal"),
            quota_share=share("stopped"),
            switches=int(passed["switches"]) if "switches" in passed else None,
        )

    def _read(self) -> dict[str, float]:
        """Return running totals in seconds; the run-queue wait of each thread, but for those that end in between."""
        import psutil

        cpu = psutil.cpu_times()
        found = {"clock": time.perf_counter(), "own": time.process_time()}
        found["busy"] = sum(getattr(cpu, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq"))
        if hasattr(cpu, "steal"):
            found["steal"] = cpu.steal
        if self._groups:
            found["stopped"] = max(map(_stopped_s, self._groups))
        with suppress(ImportError):  # Windows
            import resource

            found["switches"] = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        with suppress(OSError):
            for task in os.scandir(self._tasks):
                with suppress(OSError, IndexError, ValueError):
                    wait_ns = int(Path(task.path, "schedstat").read_bytes().split()[1])
                    found[f"thread {task.name}"] = wait_ns / 1e9
        return found


def _stopped_s(stat: Path) -> float:
    """Return the seconds for which a control group's limit stopped its threads, in version 2 or 1."""
    with suppress(OSError):
        if found := re.search(rb"(?m)^throttled_(usec|time) (\d+)$", stat.read_bytes()):
            return int(found[2]) / (1e6 if found[1] == b"usec" else 1e9)
    return 0.0


def contention(uses: Sequence[CpuUse], threads: int) -> tuple[bool | None, str]:
    """Return whether other work held the cores during `uses` together, with the reason and what to do.

    None if the system reports neither run-queue wait nor the cores that others used.
    """
    import psutil

    wall_s = sum(use.wall_s for use in uses)

    def seconds(name: str) -> float:
        return sum((getattr(use, name) or 0.0) * use.wall_s for use in uses)

    def least_s(share: float, least: float = _LEAST_S) -> float:
        return max(share * wall_s, least)

    free = max(0, (psutil.cpu_count(logical=False) or os.cpu_count() or 1) - threads)
    waited_s, others_s = seconds("wait_share"), seconds("others_cores")
    if (stopped_s := seconds("quota_share") * threads) > least_s(_MOST_SHARE * threads):
        return True, (
            f"the container's CPU limit stopped the threads for {stopped_s / wall_s / threads:.0%} of the time; "
            "use fewer threads (-t) or raise the limit, and run the same command again"
        )
    if (stolen_s := seconds("steal_share") * threads) > least_s(_MOST_SHARE * threads):
        return True, (
            f"the hypervisor took the cores for {stolen_s / wall_s / threads:.0%} of the time; "
            "run the same command again when the host is less busy"
        )
    told = []
    if waited_s > least_s(_MOST_SHARE, _LEAST_WAIT_S):
        told.append(f"a thread waited {waited_s / wall_s:.0%} of the time for a core")
    if others_s - free * wall_s > least_s(_MOST_OTHERS):
        told.append(f"other processes used {others_s / wall_s:.1f} cores")
    if told:
        return True, f"other work held the cores ({', '.join(told)}); close it and run the same command again"
    known = any(use.wait_share is not None or use.others_cores is not None for use in uses)
    return (False if known else None), ""

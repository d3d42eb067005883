"""Whether other work held the cores while something was timed.

llama.cpp's threads spin at a barrier until the last of them arrives. Where another process holds one core, the rate
falls to a fraction while the benchmark's own CPU time still looks busy. So four things are read before and after
each timed repetition, and the differences are shares of its time:

* the time that a thread was ready to run but had no core (run-queue wait, ``/proc/self/task/*/schedstat``, Linux);
* the cores that other processes used beyond those that the benchmark leaves free (every system, through psutil);
* the time that a hypervisor took from the machine (steal);
* the time that a container's CPU limit stopped the threads (``cpu.stat`` of the control groups).

What a system does not report is None. The kernel counts the last three in ticks, mostly of 10 ms.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from arte_edge.memory import cgroup_files
from arte_edge.results.rows import CpuUse
from arte_edge.threads import available_cores

__all__ = ["CpuMeter", "contention"]

# Half a percent and less on a quiet machine, 25 to 80 % with one competing process a core
# (benchmarks/contention.py); the rate falls by at least the share.
_MOST_SHARE = 0.05
_MOST_OTHERS = 0.25  # cores beyond the free ones; two threads of one core share its arithmetic units
_LEAST_S = 0.05  # five ticks


@dataclass(frozen=True)
class _Counters:
    """Running totals in seconds; `waits` by thread."""

    clock: float
    own: float
    switches: int | None
    waits: dict[str, float]
    busy: float
    steal: float | None
    stopped: float | None


class CpuMeter:
    """Measures how the cores were used between `start` and `stop`. Reusable.

    Args:
        threads: that the timed work uses.
        root: where ``proc`` and ``sys`` are; another folder in tests.
    """

    def __init__(self, threads: int, root: Path = Path("/")) -> None:
        self._threads, self._tasks = threads, root / "proc/self/task"
        # More threads than cores wait for each other.
        self._waits_tell = threads <= available_cores() or root != Path("/")
        self._groups = cgroup_files(root, "cpu", "cpu.stat", "cpu.stat")
        self._before: _Counters | None = None

    def start(self) -> None:
        self._before = self._read()

    def stop(self) -> CpuUse:
        """Return the use since `start`."""
        a, b = self._before, self._read()
        assert a is not None
        wall_s = max(b.clock - a.clock, 1e-9)
        waits = [value - a.waits.get(thread, 0.0) for thread, value in b.waits.items()]
        others_s = b.busy - a.busy - (b.own - a.own)
        counts = b.busy > a.busy or b.own - a.own < _LEAST_S  # gVisor has a /proc/stat of zeros

        def share(value: Callable[[_Counters], float | None]) -> float | None:
            first, last = value(a), value(b)
            return (
                None if first is None or last is None else _rounded((last - first) / wall_s / self._threads)
            )

        return CpuUse(
            wall_s=round(wall_s, 6),
            run_share=_rounded((b.own - a.own) / wall_s / self._threads),
            wait_share=_rounded(max(waits) / wall_s) if waits and self._waits_tell else None,
            others_cores=_rounded(max(others_s, 0.0) / wall_s) if counts else None,
            steal_share=share(lambda now: now.steal),
            quota_share=share(lambda now: now.stopped),
            switches=None if a.switches is None or b.switches is None else b.switches - a.switches,
        )

    def _read(self) -> _Counters:
        import psutil

        switches = None
        with suppress(ImportError):  # Windows
            import resource

            switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        now = psutil.cpu_times()
        kinds = ("user", "nice", "system", "irq", "softirq")
        return _Counters(
            clock=time.perf_counter(),
            own=time.process_time(),
            switches=switches,
            waits=self._read_waits(),
            busy=sum(getattr(now, kind, 0.0) for kind in kinds),
            steal=getattr(now, "steal", None),
            stopped=max(map(_stopped_s, self._groups), default=None),
        )

    def _read_waits(self) -> dict[str, float]:
        """Return the run-queue wait of every thread; of one that ended in between nothing is known."""
        found = {}
        with suppress(OSError):
            for task in os.scandir(self._tasks):
                with suppress(OSError, IndexError, ValueError):
                    found[task.name] = int(Path(task.path, "schedstat").read_bytes().split()[1]) / 1e9
        return found


def _rounded(share: float) -> float:
    return round(share, 5)


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

    def least_s(share: float) -> float:
        return max(share * wall_s, _LEAST_S)

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
    if waited_s > _MOST_SHARE * wall_s:
        told.append(f"a thread waited {waited_s / wall_s:.0%} of the time for a core")
    if others_s - free * wall_s > least_s(_MOST_OTHERS):
        told.append(f"other processes used {others_s / wall_s:.1f} cores")
    if told:
        return True, f"other work held the cores ({', '.join(told)}); close it and run the same command again"
    known = any(use.wait_share is not None or use.others_cores is not None for use in uses)
    return (False if known else None), ""

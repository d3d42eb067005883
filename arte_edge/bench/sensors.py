"""Sensors read while a test runs: memory, temperature, clock frequency, throttling.

Everything comes from files of Linux (``/sys``, ``/proc``) and, on a Raspberry Pi, from ``vcgencmd``. A
sensor that does not exist gives None and never an estimate.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from arte_edge.bench.energy import PowerProbe, find_probe, read_integer, read_text
from arte_edge.bench.vcgencmd import Vcgencmd, find_vcgencmd
from arte_edge.results.rows import Reading

__all__ = [
    "FREQUENCY_CAPPED",
    "SOFT_LIMIT",
    "STICKY_SHIFT",
    "THROTTLED",
    "UNDER_VOLTAGE",
    "Sensors",
    "judge",
    "mapped_bytes",
    "peak_rss_bytes",
    "power_supply",
]

_PROC = Path("/proc/self")


def peak_rss_bytes(proc: Path = _PROC) -> int:
    """Return the most bytes of memory that this process ever had resident, weights that it mapped included.

    ``VmHWM`` where there is ``/proc``: unlike ``ru_maxrss`` it starts anew with `exec`, so
    that a child does not inherit the peak of a large parent. Elsewhere ``ru_maxrss`` (bytes
    on macOS, kilobytes on the BSDs) and, on Windows, psutil's peak working set.
    """
    if peak := _field(proc / "status", b"VmHWM:"):
        return peak
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def mapped_bytes(paths: Sequence[Path], proc: Path = _PROC) -> int | None:
    """Return how many bytes of `paths` (files, or folders of files) this process has mapped and in memory.

    The ``Rss`` of their mappings in ``/proc/self/smaps``: 0 means that the runtime copied
    the weights instead of mapping them. None where the system does not tell.
    """
    try:
        smaps = (proc / "smaps").read_bytes()
    except OSError:
        return None
    wanted = {os.fsencode(file) for path in paths for file in _files(path)}
    total, inside = 0, False
    for line in smaps.splitlines():
        head, _, rest = line.partition(b" ")
        if not head.endswith(b":"):  # "7f00-7f10 r--p 00000000 08:01 1234  /path of/the file"
            parts = rest.split(None, 4)
            inside = len(parts) == 5 and parts[4].removesuffix(b" (deleted)") in wanted
        elif inside and head == b"Rss:":
            total += int(rest.split()[0]) * 1024
    return total


def _files(path: Path) -> list[Path]:
    real = path.resolve()
    return [file.resolve() for file in real.rglob("*") if file.is_file()] if real.is_dir() else [real]


def _field(path: Path, name: bytes) -> int:
    """Return a field of kilobytes in bytes, 0 if it is not there."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
UNDER_VOLTAGE, FREQUENCY_CAPPED, THROTTLED, SOFT_LIMIT = 1 << 0, 1 << 1, 1 << 2, 1 << 3
STICKY_SHIFT = 16  # the same four, since the boot
_WORDS = (
    (UNDER_VOLTAGE, "under-voltage: use the official power supply and a short cable"),
    (THROTTLED, "too hot, throttled: cool it, or let it rest between tests"),
    (SOFT_LIMIT, "soft temperature limit reached: cool it, or let it rest between tests"),
    (FREQUENCY_CAPPED, "clock capped by the firmware: check supply and cooling"),
)
_LIMIT_C = 80.0  # where nothing better is known: a Raspberry Pi's first limit
_NEAR_C = 5.0
_FALL = 0.9  # below this share of its best clock a machine was held back
_ENOUGH = 6  # readings: two in the last third


def judge(
    before: int | None, readings: Sequence[Reading], after: int | None, limit_c: float | None = None
) -> tuple[bool | None, str]:
    """Return whether the machine was throttled, and why in words.

    Three things count: a bit that held at one of the readings, a bit "since the boot"
    that was not set before the test and is set after it (it catches what fell between
    two readings), and a clock whose best in the last third of the test is a tenth below
    its best in the first half, while the temperature was within 5 °C of its limit. The
    best counts, not the mean: a core that waits for the disk clocks down as well.

    Args:
        before: throttle bits before the test, None if this machine has none.
        readings: the sensors during it, in order.
        after: the bits after it.
        limit_c: temperature from which this machine lowers its clock; None takes 80 °C.

    Returns:
        True with the reasons, False with an empty reason, or (None, "") where nothing tells.
    """
    live = [reading.throttle_bits for reading in readings if reading.throttle_bits is not None]
    bits = 0
    for value in live:
        bits |= value & 0xF
    if before is not None and after is not None:
        bits |= (after & ~before) >> STICKY_SHIFT & 0xF
    reasons = [words for bit, words in _WORDS if bits & bit]
    heat = _hot_and_slower(readings, _LIMIT_C if limit_c is None else limit_c)
    if heat and not reasons:
        reasons.append(heat)
    if reasons:
        return True, "; ".join(reasons)
    told = bool(live) or (before is not None and after is not None) or heat is not None
    return (False, "") if told else (None, "")


def _hot_and_slower(readings: Sequence[Reading], limit_c: float) -> str | None:
    """Return what happened in words, empty if nothing did, None if clock or temperature are not known."""
    known = [(r.clock_mhz, r.temperature_c) for r in readings]
    clocks = [clock for clock, heat in known if clock is not None and heat is not None]
    heats = [heat for clock, heat in known if clock is not None and heat is not None]
    if len(clocks) < _ENOUGH:
        return None
    best, last = max(clocks[: -(-len(clocks) // 2)]), max(clocks[-(-2 * len(clocks) // 3) :])
    if last >= _FALL * best or max(heats) < limit_c - _NEAR_C:
        return ""
    return (
        f"clock fell from {best:.0f} to {last:.0f} MHz at {max(heats):.0f} °C: "
        "cool it, or let it rest between tests"
    )


_ROOT = Path("/")
_MOST = 7200  # readings kept: two hours
# Zones that are the processor, surest first; others (battery, wireless, the board's acpitz) are not.
_ZONES = (
    re.compile(r"x86_pkg_temp|cpu.*|bigcore.*|cluster.*", re.IGNORECASE),
    re.compile(r"soc.*|package.*|center[-_]thermal", re.IGNORECASE),
)
# https://docs.kernel.org/hwmon/: chips within x86 processors, and the labels that stand for all of it
_CHIPS = ("coretemp", "k10temp", "zenpower")
_LABELS = ("Package", "Tctl", "Tdie")
_X86_LIMIT_C = 95.0  # AMD's data sheets, Zen 2 to 4; Intel's chips say theirs, mostly 100


class Sensors:
    """Reads while the ``with`` block runs; see `readings`, `bits_before`, `bits_after`, `limit_c`."""

    def __init__(
        self,
        *,
        period_s: float = 1.0,
        root: Path = _ROOT,
        vcgencmd: str | None = None,
        power_watts: float | None = None,
    ) -> None:
        """Find what there is.

        Args:
            period_s: between two readings.
            root: where ``sys`` is; another folder in tests.
            vcgencmd: path of it; None looks in PATH.
            power_watts: a steady reading of the user's own meter, in W.
        """
        self._period_s = period_s
        self._firmware = find_vcgencmd(vcgencmd, root)
        self._temperatures, self.limit_c = _temperature_files(root)
        self._clocks = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
        self._power: PowerProbe | None = find_probe(root=root, vcgencmd=vcgencmd, power_watts=power_watts)[0]
        self._bits = _throttle_source(self._firmware, root)
        self._readings: deque[Reading] = deque(maxlen=_MOST)
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._begin = 0.0
        self.bits_before: int | None = None
        self.bits_after: int | None = None

    def __enter__(self) -> Sensors:
        self._readings.clear()
        self._done.clear()
        self._begin = time.monotonic()
        self.bits_before = self.bits_after = self._bits()
        self._read()
        self._thread = threading.Thread(target=self._run, name="sensors", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.bits_after = self._bits()

    def readings(self) -> tuple[Reading, ...]:
        """Return what was read so far, in order, at most the last two hours of it."""
        return tuple(self._readings)

    def _run(self) -> None:
        due = time.monotonic() + self._period_s
        while not self._done.wait(max(0.0, due - time.monotonic())):
            self._read()
            due = max(due + self._period_s, time.monotonic())

    def _read(self) -> None:
        t_s = time.monotonic() - self._begin
        reading = Reading(
            t_s=round(t_s, 3),
            temperature_c=self._temperature(),
            clock_mhz=self._clock(),
            throttle_bits=self._bits(),
            power_w=None if self._power is None else self._power.watts(),
        )
        self._readings.append(reading)

    def _temperature(self) -> float | None:
        values = [value / 1000 for file in self._temperatures if (value := read_integer(file)) is not None]
        if values:
            return max(values)
        return None if self._firmware is None else self._firmware.temperature_c()

    def _clock(self) -> float | None:
        """Return the clock of the fastest core in MHz; the firmware's word counts before the kernel's."""
        if self._firmware is not None and (clock := self._firmware.clock_mhz()) is not None:
            return clock
        values = [value / 1000 for file in self._clocks if (value := read_integer(file)) is not None]
        return max(values, default=None)


def power_supply() -> str:
    """Return ``mains`` or ``battery``, as psutil tells on every system; empty where nothing tells."""
    import psutil

    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, NotImplementedError):
        return ""
    if battery is None or battery.power_plugged is None:
        return ""
    return "mains" if battery.power_plugged else "battery"


def _temperature_files(root: Path) -> tuple[list[Path], float | None]:
    """Return the files of the processor's temperature (millidegrees) and where it is slowed down, in °C.

    Of several that are equally sure the hottest counts at each reading.
    """
    kinds = {
        file.parent: read_text(file) for file in sorted(root.glob("sys/class/thermal/thermal_zone*/type"))
    }
    zones = [[zone for zone, kind in kinds.items() if pattern.fullmatch(kind)] for pattern in _ZONES]
    chips = _chips(root)
    for candidates in (zones[0], chips, zones[1]):
        if working := [path for path in candidates if read_integer(_temperature_of(path)) is not None]:
            x86 = any(kinds.get(path) == "x86_pkg_temp" for path in working) or candidates is chips
            limit_c = _critical_c(chips) if x86 else _passive_c(working)
            return [_temperature_of(path) for path in working], limit_c
    return [], None


def _temperature_of(path: Path) -> Path:
    return path if path.name.endswith("_input") else path / "temp"


def _chips(root: Path) -> list[Path]:
    """Return the temperature inputs of the processor's own sensor chips: the package's if it is labelled."""
    found: list[Path] = []
    for name in sorted(root.glob("sys/class/hwmon/hwmon*/name")):
        if read_text(name) in _CHIPS:
            inputs = sorted(name.parent.glob("temp*_input"))
            labelled = [
                i for i in inputs if read_text(Path(str(i)[: -len("input")] + "label")).startswith(_LABELS)
            ]
            found += labelled or inputs
    return found


def _critical_c(inputs: Sequence[Path]) -> float:
    """Return the lowest critical temperature of the chips in °C; AMD's do not say theirs, so 95.

    Not the trip points of ``x86_pkg_temp``: they are thresholds that someone wants to be told of.
    """
    files = [Path(str(path)[: -len("input")] + "crit") for path in inputs]
    points = [value / 1000 for file in files if (value := read_integer(file)) is not None and value > 0]
    return min(points, default=_X86_LIMIT_C)


def _passive_c(zones: Sequence[Path]) -> float | None:
    """Return the lowest ``passive`` trip point of thermal zones in °C: from there the kernel lowers the clock."""
    points = [
        value / 1000
        for zone in zones
        for kind in sorted(zone.glob("trip_point_*_type"))
        if read_text(kind) == "passive"
        and (value := read_integer(kind.with_name(kind.name.removesuffix("type") + "temp"))) is not None
        and value > 0
    ]
    return min(points, default=None)


def _throttle_source(firmware: Vcgencmd | None, root: Path) -> Callable[[], int | None]:
    """Return what tells throttling here, in the bits of ``vcgencmd get_throttled``."""
    if firmware is not None:
        return firmware.throttled
    # Intel: Documentation/ABI/testing/sysfs-devices-system-cpu, one count of the package's events a core
    counts = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count"))
    if counts:
        return _Counted(counts)
    if sys.platform == "darwin" and root == _ROOT:
        return _mac_bits
    return lambda: None


class _Counted:
    """Makes bits of Intel's counters of throttle events: held since the last look, held since the first one."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._first: int | None = None
        self._last: int | None = None

    def __call__(self) -> int | None:
        values = [value for file in self._files if (value := read_integer(file)) is not None]
        if not values:
            return None
        count = sum(values)
        first = self._first = count if self._first is None else self._first
        last, self._last = count if self._last is None else self._last, count
        return (THROTTLED if count > last else 0) | (THROTTLED << STICKY_SHIFT if count > first else 0)


def _mac_bits() -> int | None:
    """Return the throttled bit from the speed limit of ``pmset -g therm``; Apple silicon does not print one."""
    try:
        done = subprocess.run(["pmset", "-g", "therm"], capture_output=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(rb"CPU_Speed_Limit\s*=\s*(\d+)", done.stdout)
    return None if found is None else THROTTLED if int(found[1]) < 100 else 0

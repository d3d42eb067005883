"""Sensors read while a test runs: temperature, clock frequency, throttling, power and energy.

Values come from Linux' ``/sys`` and, on a Raspberry Pi, from ``vcgencmd``, the only source there of the actual
clock frequency (``scaling_cur_freq`` is the requested one): a process of a few milliseconds,
https://www.raspberrypi.com/documentation/computers/os.html#vcgencmd. A missing sensor gives None, never an estimate.

Power is taken from the first of these: the reading of an external meter (``--power-watts``), an INA219 or a
relative of it (hwmon; the whole board, if it is wired so), a Jetson's INA3221, RAPL (x86: the processor package
alone), the power chip of a Raspberry Pi 5 (the rails that it measures). Energy counters are read directly;
power readings are integrated over time (trapezoidal rule).
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from arte_edge.device.detect import read_text
from arte_edge.results.rows import Reading

_ROOT = Path("/")

# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
UNDER_VOLTAGE, FREQUENCY_CAPPED, THROTTLED, SOFT_LIMIT = 1 << 0, 1 << 1, 1 << 2, 1 << 3
STICKY_SHIFT = 16  # the same four bits, since boot
_TIMEOUT_S = 2.0
_RAIL = re.compile(r"^\s*(\S+)_([AV])\s+(?:current|volt)\(\d+\)=(\d+(?:\.\d*)?)[AV]\s*$", re.MULTILINE)


class Vcgencmd:
    """The firmware of a Raspberry Pi; None where it does not answer. It is not called again after a timeout."""

    def __init__(self, executable: str) -> None:
        self._executable = executable
        self._hung = False

    def throttled(self) -> int | None:
        """Return the bits of ``get_throttled``: 0-3 the current state, 16-19 the same since boot."""
        found = re.search(r"throttled=(0x[0-9a-fA-F]+)", self._call("get_throttled"))
        return int(found[1], 16) if found else None

    def clock_mhz(self) -> float | None:
        """Return the actual clock of the ARM cores in MHz."""
        found = re.search(r"=(\d+)\s*$", self._call("measure_clock", "arm"))
        return int(found[1]) / 1e6 if found else None

    def temperature_c(self) -> float | None:
        found = re.search(r"temp=(\d+(?:\.\d*)?)", self._call("measure_temp"))
        return float(found[1]) if found else None

    def pmic_w(self) -> float | None:
        """Return the power that a Pi 5's power chip delivers: volts times amperes, summed over its rails.

        Only rails with both values count. Devices on the 5 V input (USB, fan, HAT) and the chip's own losses
        are not included, so a meter in the supply line reads more.
        """
        rails: dict[str, dict[str, float]] = {}
        for name, kind, value in _RAIL.findall(self._call("pmic_read_adc")):
            rails.setdefault(name, {})[kind] = float(value)
        products = [rail["A"] * rail["V"] for rail in rails.values() if len(rail) == 2]
        return sum(products) if products else None

    def _call(self, *args: str) -> str:
        """Return its output, empty if it fails; a firmware without the command prints an error and exits with 0."""
        if self._hung:
            return ""
        try:
            done = subprocess.run(
                [self._executable, *args],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            self._hung = True
            return ""
        except OSError:
            return ""
        return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def find_vcgencmd(executable: str | None, root: Path = Path("/")) -> Vcgencmd | None:
    """Return vcgencmd if it exists (None: in PATH) and the firmware answers; this needs the group ``video``."""
    found = executable or (shutil.which("vcgencmd") if root == Path("/") else None)
    if found is None:
        return None
    firmware = Vcgencmd(found)
    return firmware if firmware.throttled() is not None else None


# Linux: drivers/hwmon/ina2xx.c; power1_input is in microwatts.
_INA2XX = ("ina219", "ina220", "ina226", "ina230", "ina231")


@dataclass(frozen=True)
class PowerProbe:
    """A source of power readings; None where it cannot be read. An energy counter has `joules` as well."""

    source: str  # meter, ina219, ina3221, rapl, pmic
    watts: Callable[[], float | None]
    joules: Callable[[], float | None] | None = None


class _Rapl:
    """The energy counters of all processor packages; each wraps around at its own maximum."""

    def __init__(self, packages: list[Path]) -> None:
        self._packages = packages
        self._range_uj = [read_integer(p / "max_energy_range_uj") or 0 for p in packages]
        self._last: list[int] = []
        self._total_uj = 0
        self._before: tuple[float, float] | None = None  # time and energy at the last call of `watts`

    def joules(self) -> float | None:
        """Return the energy since the first call; must be called more often than a counter wraps around."""
        now = [read_integer(package / "energy_uj") for package in self._packages]
        counts = [count for count in now if count is not None]
        if len(counts) < len(now):
            return None
        for count, last, size in zip(counts, self._last, self._range_uj, strict=False):
            self._total_uj += count - last if count >= last else count - last + size
        self._last = counts
        return self._total_uj / 1e6

    def watts(self) -> float | None:
        joules, now = self.joules(), time.monotonic()
        before, self._before = self._before, None if joules is None else (now, joules)
        if joules is None or before is None or now <= before[0]:
            return None
        return (joules - before[1]) / (now - before[0])


def find_probe(
    *, root: Path = _ROOT, vcgencmd: str | None = None, power_watts: float | None = None
) -> PowerProbe | None:
    """Return the power probe of this machine, None if there is none that it may read.

    Args:
        root: where ``sys`` is; another folder in tests.
        vcgencmd: its path; None looks in PATH.
        power_watts: a steady reading of an external meter.
    """
    if power_watts is not None:
        return PowerProbe("meter", lambda: power_watts)
    for name in sorted(root.glob("sys/class/hwmon/hwmon*/name")):
        if (ina := _ina(name.parent, read_text(name))) is not None and ina.watts() is not None:
            return ina
    domains = sorted(root.glob("sys/class/powercap/intel-rapl:*"))
    # not a package's parts (core, uncore, dram), nor psys around it
    if packages := [path for path in domains if read_text(path / "name").startswith("package")]:
        rapl = _Rapl(packages)  # which mostly only root may read
        return None if rapl.joules() is None else PowerProbe("rapl", rapl.watts, rapl.joules)
    firmware = find_vcgencmd(vcgencmd, root)
    if firmware is not None and firmware.pmic_w() is not None:
        return PowerProbe("pmic", firmware.pmic_w)
    return None


def _ina(folder: Path, name: str) -> PowerProbe | None:
    """Return the probe of an INA2xx on the board's input, or of the ``VDD_IN`` channel of a Jetson's INA3221."""

    def value(file: str) -> float:
        number = read_integer(folder / file)
        return math.nan if number is None else float(number)

    def probe(watts: Callable[[], float]) -> PowerProbe:
        return PowerProbe(name, lambda: None if math.isnan(now := watts()) else now)

    if name in _INA2XX:
        return probe(lambda: value("power1_input") / 1e6)
    labels = sorted(folder.glob("in*_label")) if name == "ina3221" else []
    if (label := next((label for label in labels if read_text(label) == "VDD_IN"), None)) is None:
        return None
    n = label.name.removeprefix("in").removesuffix("_label")
    return probe(lambda: value(f"in{n}_input") * value(f"curr{n}_input") / 1e6)  # mV, mA


class _Periodic:
    """Calls `sample` every `period_s` seconds in a background thread."""

    def __init__(self, sample: Callable[[], None], period_s: float) -> None:
        self._sample, self._period_s = sample, period_s
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._done.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> bool:
        """Stop and return whether it was running."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._done.set()
            thread.join()
        return thread is not None

    def _run(self) -> None:
        due = time.monotonic() + self._period_s
        while not self._done.wait(max(0.0, due - time.monotonic())):
            self._sample()
            due = max(due + self._period_s, time.monotonic())


class EnergyMeter:
    """Measures the energy between `start` and `stop`, sampling in a background thread. Reusable."""

    def __init__(
        self,
        *,
        period_s: float = 1.0,
        root: Path = _ROOT,
        vcgencmd: str | None = None,
        power_watts: float | None = None,
    ) -> None:
        self._probe = find_probe(root=root, vcgencmd=vcgencmd, power_watts=power_watts)
        self._thread = _Periodic(self._sample, period_s)
        self._start_j: float | None = None
        self._joules: float | None = None
        self._last: tuple[float, float] | None = None

    @property
    def source(self) -> str:
        """The name of the probe, empty if there is none."""
        return "" if self._probe is None else self._probe.source

    def start(self) -> None:
        if self._probe is not None:
            self._thread.stop()
            self._start_j, self._joules, self._last = None, 0.0, None
            self._sample()
            self._thread.start()

    def stop(self) -> tuple[float | None, str]:
        """Return the joules since `start` and their source; (None, "") if any reading failed."""
        if not self._thread.stop():
            return None, ""
        self._sample()
        return (None, "") if self._joules is None else (self._joules, self.source)

    def _sample(self) -> None:
        """Update the sum; a failed reading makes it unknown for good instead of too small."""
        probe = self._probe
        if probe is None or self._joules is None:
            return
        if probe.joules is not None:
            total = probe.joules()
            if self._start_j is None:
                self._start_j = total
            self._joules = None if total is None or self._start_j is None else total - self._start_j
            return
        watts, now = probe.watts(), time.monotonic()
        if watts is None:
            self._joules = None
            return
        if self._last is not None:
            self._joules += (watts + self._last[1]) / 2 * (now - self._last[0])
        self._last = (now, watts)


def read_integer(path: Path) -> int | None:
    """Return the number in a file of /sys, None if it cannot be read."""
    try:
        return int(path.read_bytes())
    except (OSError, ValueError):
        return None


_MAX_READINGS = 7200  # two hours
# Thermal zones of the processor, the most specific first; others are batteries, wireless, the board (acpitz).
_ZONES = (
    re.compile(r"x86_pkg_temp|cpu.*|bigcore.*|cluster.*", re.IGNORECASE),
    re.compile(r"soc.*|package.*|center[-_]thermal", re.IGNORECASE),
)
# https://docs.kernel.org/hwmon/: sensors inside x86 processors, and the labels for the whole package
_CHIPS = ("coretemp", "k10temp", "zenpower")
_LABELS = ("Package", "Tctl", "Tdie")
_X86_LIMIT_C = 95.0  # AMD's data sheets, Zen 2 to 4; Intel's chips report theirs, mostly 100


class Sensors:
    """Reads the sensors while the ``with`` block runs; see `readings`, `bits_before`, `bits_after`, `limit_c`."""

    def __init__(
        self,
        *,
        period_s: float = 1.0,
        root: Path = _ROOT,
        vcgencmd: str | None = None,
        power_watts: float | None = None,
    ) -> None:
        self._firmware = find_vcgencmd(vcgencmd, root)
        self._temperatures, self.limit_c = _temperature_files(root)
        self._clocks = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
        self._power = find_probe(root=root, vcgencmd=vcgencmd, power_watts=power_watts)
        self._bits = _throttle_source(self._firmware, root)
        self._readings: deque[Reading] = deque(maxlen=_MAX_READINGS)
        self._thread = _Periodic(self._read, period_s)
        self._begin = 0.0
        self.bits_before: int | None = None
        self.bits_after: int | None = None

    def __enter__(self) -> Sensors:
        self._readings.clear()
        self._begin = time.monotonic()
        self.bits_before = self.bits_after = self._bits()
        self._read()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.stop()
        self.bits_after = self._bits()

    def readings(self) -> tuple[Reading, ...]:
        """Return the readings so far, in order, at most those of the last two hours."""
        return tuple(self._readings)

    def _read(self) -> None:
        t_s = time.monotonic() - self._begin
        firmware = self._firmware
        temperature_c = _highest(self._temperatures)
        if temperature_c is None and firmware is not None:
            temperature_c = firmware.temperature_c()
        clock_mhz = None if firmware is None else firmware.clock_mhz()
        reading = Reading(
            t_s=round(t_s, 3),
            temperature_c=temperature_c,
            clock_mhz=_highest(self._clocks) if clock_mhz is None else clock_mhz,  # of the fastest core
            throttle_bits=self._bits(),
            power_w=None if self._power is None else self._power.watts(),
        )
        self._readings.append(reading)


def _highest(files: Sequence[Path]) -> float | None:
    """Return the largest of the numbers in `files` in thousands, None if none can be read."""
    return max((value / 1000 for file in files if (value := read_integer(file)) is not None), default=None)


def _temperature_files(root: Path) -> tuple[list[Path], float | None]:
    """Return the files of the processor's temperature (millidegrees) and its throttling temperature in °C.

    Of several equally specific files the hottest counts at each reading.
    """
    kinds = {file.parent: read_text(file) for file in sorted(root.glob("sys/class/thermal/thermal_zone*/type"))}
    zones = [[zone for zone, kind in kinds.items() if pattern.fullmatch(kind)] for pattern in _ZONES]
    chips = _chips(root)
    for candidates in (zones[0], chips, zones[1]):
        files = {path: path if path.name.endswith("_input") else path / "temp" for path in candidates}
        if readable := {path: file for path, file in files.items() if read_integer(file) is not None}:
            x86 = any(kinds.get(path) == "x86_pkg_temp" for path in readable) or candidates is chips
            limit_c = _critical_c(chips) if x86 else _passive_c(list(readable))
            return list(readable.values()), limit_c
    return [], None


def _chips(root: Path) -> list[Path]:
    """Return the temperature inputs of the processor's own sensors: that of the package if there is a label."""
    found: list[Path] = []
    for name in sorted(root.glob("sys/class/hwmon/hwmon*/name")):
        if read_text(name) in _CHIPS:
            inputs = sorted(name.parent.glob("temp*_input"))
            labelled = [i for i in inputs if read_text(_beside(i, "label")).startswith(_LABELS)]
            found += labelled or inputs
    return found


def _beside(path: Path, kind: str) -> Path:
    """Return the file of another kind for ``temp1_input`` or ``trip_point_0_type``."""
    return path.with_name(f"{path.name.rpartition('_')[0]}_{kind}")


def _critical_c(inputs: Sequence[Path]) -> float:
    """Return the lowest critical temperature of the chips in °C; AMD's do not report it, so 95.

    The trip points of ``x86_pkg_temp`` are notification thresholds, not limits.
    """
    values = (read_integer(_beside(path, "crit")) for path in inputs)
    return min((value / 1000 for value in values if value is not None and value > 0), default=_X86_LIMIT_C)


def _passive_c(zones: Sequence[Path]) -> float | None:
    """Return the lowest ``passive`` trip point in °C: above it the kernel lowers the clock."""
    points = [
        value / 1000
        for zone in zones
        for kind in sorted(zone.glob("trip_point_*_type"))
        if read_text(kind) == "passive" and (value := read_integer(_beside(kind, "temp"))) is not None and value > 0
    ]
    return min(points, default=None)


def _throttle_source(firmware: Vcgencmd | None, root: Path) -> Callable[[], int | None]:
    """Return a function that reads the throttling state as the bits of ``vcgencmd get_throttled``."""
    if firmware is not None:
        return firmware.throttled
    # Intel: Documentation/ABI/testing/sysfs-devices-system-cpu, one count of the package's events per core
    counts = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count"))
    if counts:
        return _Counted(counts)
    if sys.platform == "darwin" and root == _ROOT:
        return _mac_bits
    return lambda: None


class _Counted:
    """Turns Intel's counters of throttle events into bits: since the last call, since the first one."""

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
    """Return the throttled bit from the speed limit of ``pmset -g therm``; Apple silicon has none."""
    try:
        done = subprocess.run(["pmset", "-g", "therm"], capture_output=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(rb"CPU_Speed_Limit\s*=\s*(\d+)", done.stdout)
    return None if found is None else THROTTLED if int(found[1]) < 100 else 0

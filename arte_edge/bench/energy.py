"""Energy where something measures it, and nothing where nothing does: never an estimate.

In this order: a meter in the supply line that the user reads off (``--power-watts``, a steady
reading times the time), an INA219 or one of its kin (hwmon; the whole board, if it is wired
so), a Jetson's INA3221, RAPL (x86: the processor package alone), and the power chip of a
Raspberry Pi 5 (the rails that it sees). Counters of energy are read as such; readings of power are
integrated over time, trapezoid by trapezoid.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Protocol

from arte_edge.bench.vcgencmd import Vcgencmd, find_vcgencmd

__all__ = ["EnergyMeter", "PowerProbe", "find_probe", "read_integer", "read_text"]

_ROOT = Path("/")
# Linux: drivers/hwmon/ina2xx.c; power1_input is in microwatts.
_INA2XX = ("ina219", "ina220", "ina226", "ina230", "ina231")
_NO_RAPL = (
    "RAPL is there but only root may read it, so energy was not measured; "
    "for this boot: sudo chmod -R a+r /sys/class/powercap/intel-rapl:*"
)


class PowerProbe(Protocol):
    """Something that measures."""

    @property
    def source(self) -> str:
        """``meter``, ``ina219``, ``ina3221``, ``rapl``, ``pmic``."""

    def watts(self) -> float | None:
        """Return the power now, None if it cannot be read."""


class _Meter:
    source = "meter"

    def __init__(self, watts: float) -> None:
        self._watts = watts

    def watts(self) -> float:
        return self._watts


class _Ina:
    """An INA2xx on the board's input, or the ``VDD_IN`` channel of a Jetson's INA3221."""

    def __init__(self, folder: Path, source: str, channel: str = "") -> None:
        self.source, self._folder, self._channel = source, folder, channel

    def watts(self) -> float | None:
        if not self._channel:
            power_uw = read_integer(self._folder / "power1_input")
            return None if power_uw is None else power_uw / 1e6
        volts_m = read_integer(self._folder / f"in{self._channel}_input")
        amperes_m = read_integer(self._folder / f"curr{self._channel}_input")
        return None if volts_m is None or amperes_m is None else volts_m * amperes_m / 1e6


class _Pmic:
    source = "pmic"

    def __init__(self, firmware: Vcgencmd) -> None:
        self._firmware = firmware

    def watts(self) -> float | None:
        return self._firmware.pmic_w()


class _Rapl:
    """The energy counters of all processor packages; each begins again at its own maximum."""

    source = "rapl"

    def __init__(self, packages: list[Path]) -> None:
        self._packages = packages
        self._range_uj = [read_integer(p / "max_energy_range_uj") or 0 for p in packages]
        self._last: list[int] = []
        self._total_uj = 0
        self._before: tuple[float, float] | None = None  # when and how much, at the last call of `watts`

    def joules(self) -> float | None:
        """Return the energy since the first call; to be called more often than a counter begins again."""
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
) -> tuple[PowerProbe | None, str]:
    """Return what measures power here, and a note where something would if it could be read.

    Args:
        root: where ``sys`` is; another folder in tests.
        vcgencmd: path of it; None looks in PATH.
        power_watts: a steady reading of the user's own meter.
    """
    if power_watts is not None:
        return _Meter(power_watts), ""
    for name in sorted(root.glob("sys/class/hwmon/hwmon*/name")):
        if (ina := _ina(name.parent, read_text(name))) is not None and ina.watts() is not None:
            return ina, ""
    packages = [
        path
        for path in sorted(root.glob("sys/class/powercap/intel-rapl:*"))
        if read_text(path / "name").startswith(
            "package"
        )  # not core, uncore or dram within it, nor psys around it
    ]
    if packages:
        rapl = _Rapl(packages)
        return (rapl, "") if rapl.joules() is not None else (None, _NO_RAPL)
    firmware = find_vcgencmd(vcgencmd, root)
    if firmware is not None and firmware.pmic_w() is not None:
        return _Pmic(firmware), ""
    return None, ""


def _ina(folder: Path, name: str) -> _Ina | None:
    if name in _INA2XX:
        return _Ina(folder, name)
    if name == "ina3221":
        for label in sorted(folder.glob("in*_label")):
            if read_text(label) == "VDD_IN":
                return _Ina(folder, name, label.name.removeprefix("in").removesuffix("_label"))
    return None


class EnergyMeter:
    """Measures the joules between `start` and `stop`, sampling in a background thread. Can be used again."""

    def __init__(
        self,
        *,
        period_s: float = 1.0,
        root: Path = _ROOT,
        vcgencmd: str | None = None,
        power_watts: float | None = None,
    ) -> None:
        self._probe, self.note = find_probe(root=root, vcgencmd=vcgencmd, power_watts=power_watts)
        self._period_s = period_s
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._start_j: float | None = None
        self._joules: float | None = None
        self._last: tuple[float, float] | None = None

    @property
    def source(self) -> str:
        """Return what measures; empty where nothing does."""
        return "" if self._probe is None else self._probe.source

    def start(self) -> None:
        """Begin to count."""
        if self._probe is None:
            return
        self._end()
        self._done.clear()
        self._start_j, self._joules, self._last = None, 0.0, None
        self._sample()
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True)
        self._thread.start()

    def stop(self) -> tuple[float | None, str]:
        """Return the joules since `start` and what measured them; (None, "") where nothing did throughout."""
        if self._thread is None:
            return None, ""
        self._end()
        self._sample()
        return (None, "") if self._joules is None else (self._joules, self.source)

    def _end(self) -> None:
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while not self._done.wait(self._period_s):
            self._sample()

    def _sample(self) -> None:
        """Bring the sum up to now; a reading that fails makes it unknown for good, rather than too small."""
        probe = self._probe
        if probe is None or self._joules is None:
            return
        if isinstance(probe, _Rapl):
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


def read_text(path: Path) -> str:
    """Return the text of a file of /sys, empty if it cannot be read."""
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""

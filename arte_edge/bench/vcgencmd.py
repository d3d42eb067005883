"""Ask a Raspberry Pi's firmware through ``vcgencmd``: clock, temperature, throttle bits, the rails of its PMIC.

The firmware is the only one on a Pi that knows the real clock: what Linux shows in
``scaling_cur_freq`` is the clock that was asked for. A call is a process of a few milliseconds.
Words and units: https://www.raspberrypi.com/documentation/computers/os.html#vcgencmd
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

__all__ = ["Vcgencmd", "find_vcgencmd"]

_TIMEOUT_S = 2.0
_RAIL = re.compile(r"^\s*(\S+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9.]+)[AV]\s*$", re.MULTILINE)


class Vcgencmd:
    """The firmware's answers; None where it does not answer. It is not asked again after it once hung."""

    def __init__(self, executable: str) -> None:
        self._executable = executable
        self._hung = False

    def throttled(self) -> int | None:
        """Return the bits of ``get_throttled``: 0-3 what holds now, 16-19 what held since the boot."""
        found = re.search(r"throttled=(0x[0-9a-fA-F]+)", self._ask("get_throttled"))
        return int(found[1], 16) if found else None

    def clock_mhz(self) -> float | None:
        """Return the real clock of the ARM cores in MHz."""
        found = re.search(r"=(\d+)\s*$", self._ask("measure_clock", "arm"))
        return int(found[1]) / 1e6 if found else None

    def temperature_c(self) -> float | None:
        """Return the temperature of the chip in °C."""
        found = re.search(r"temp=([0-9.]+)", self._ask("measure_temp"))
        return _number(found[1]) if found else None

    def pmic_w(self) -> float | None:
        """Return the watts that a Pi 5's power chip delivers: volts times amperes of each rail, added up.

        A rail counts if the chip measures both. It does not see what hangs on the 5 V
        input directly (USB devices, the fan, a HAT) nor its own losses, so a meter in
        the supply line reads more.
        """
        rails: dict[str, dict[str, float]] = {}
        for name, kind, value in _RAIL.findall(self._ask("pmic_read_adc")):
            if (number := _number(value)) is not None:
                rails.setdefault(name, {})[kind] = number
        pairs = [rail["A"] * rail["V"] for rail in rails.values() if len(rail) == 2]
        return sum(pairs) if pairs else None

    def _ask(self, *words: str) -> str:
        """Return what it prints, empty if it fails; a firmware without the command prints an error and ends with 0."""
        if self._hung:
            return ""
        try:
            done = subprocess.run(
                [self._executable, *words],
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
    """Return it if it is there and the firmware answers (it needs the group ``video``), None otherwise.

    Args:
        executable: a path; None looks in PATH, but not for a fake `root`.
        root: where ``sys`` is; another folder in tests.
    """
    found = executable or (shutil.which("vcgencmd") if root == Path("/") else None)
    if found is None:
        return None
    firmware = Vcgencmd(found)
    return firmware if firmware.throttled() is not None else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

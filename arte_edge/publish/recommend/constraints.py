"""What a user requires of a file on a device, and how sizes are written: 1GB, 512MiB."""

from __future__ import annotations

import re
from dataclasses import dataclass

from arte_edge.errors import InputError

__all__ = ["Constraints", "parse_size", "size_text"]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Constraints:
    """The limits; None: no limit. Each is checked on its own, and one that cannot be checked is not satisfied."""

    max_ram_bytes: int | None = None  # peak resident memory of the process that runs the file
    min_decode: float | None = None  # tokens per second
    max_drop: float | None = None  # points of accuracy below the 16-bit student
    max_size_bytes: int | None = None
    max_answer_seconds: float | None = None
    prompt_tokens: int = 256  # of one prompt, for an answer time that was not measured
    answer_tokens: int = 64

    @property
    def any(self) -> bool:
        """Whether there is any limit."""
        limits = (self.max_ram_bytes, self.min_decode, self.max_drop, self.max_size_bytes)
        return any(limit is not None for limit in (*limits, self.max_answer_seconds))


def parse_size(text: str, what: str) -> int:
    """Return bytes: ``1GB`` and ``1G`` are decimal, ``1GiB`` is binary, a bare number is bytes.

    Raises:
        InputError: not a size above zero; names `what`.
    """
    found = _SIZE.fullmatch(text)
    unit = found.group(2).upper() if found else "?"
    scale = _UNITS.get(unit) or _UNITS.get(f"{unit}B" if len(unit) == 1 else "?")
    size_bytes = round(float(found.group(1)) * scale) if found and scale else 0
    if size_bytes < 1:
        raise InputError(f"{what} {text}: not a size", "Write it as 1GB, 512MiB or 800000000.")
    return size_bytes


def size_text(size_bytes: float) -> str:
    """Return bytes as a short decimal text: 105 MB, 1.25 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            digits = 2 if unit == "GB" else 0 if size_bytes >= 100 * scale else 1
            return f"{size_bytes / scale:.{digits}f} {unit}"
    return f"{size_bytes:.0f} B"

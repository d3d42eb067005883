"""What this process holds in memory: its highest resident size, and the part of the model's files in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["mapped_bytes", "peak_rss_bytes"]

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

"""What this process may use of the machine: its cores, and the memory, of a container's limit if that is less.

A runtime uses as many threads as the caller says, else ``ARTE_EDGE_THREADS``, else as many as there are cores.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from arte_edge.errors import InputError

_VARIABLE = "ARTE_EDGE_THREADS"


def thread_count(threads: int | None = None) -> int:
    """Return `threads` if given, else ``ARTE_EDGE_THREADS``, else the cores this process may use.

    Raises InputError: ``ARTE_EDGE_THREADS`` is not a positive number.
    """
    return threads or threads_from_environment() or available_cores()


def threads_from_environment() -> int | None:
    """Return ``ARTE_EDGE_THREADS``, None if it is not set. Raises InputError: it is not a positive number."""
    text = os.environ.get(_VARIABLE, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise InputError(f"{_VARIABLE}={text}: not a number of threads", "For example 4.")
    return int(text)


def environment_for(threads: int) -> dict[str, str]:
    """Return the variables that hold another process to so many threads, torch's too."""
    return dict.fromkeys((_VARIABLE, "OMP_NUM_THREADS"), str(threads))


def available_cores() -> int:
    """Return the cores this process may use; containers often grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_NO_LIMIT_BYTES = 1 << 60  # version 1 of control groups uses such numbers instead of "max"


def machine_bytes(root: Path = Path("/")) -> int:
    """Return the machine's memory in bytes as the kernel reports it; 0 if unknown."""
    if (kilobytes := _meminfo(root).get("MemTotal")) is not None:
        return kilobytes
    import psutil

    return int(psutil.virtual_memory().total) if root == Path("/") else 0


def total_bytes(root: Path = Path("/")) -> int:
    """Return the total memory this process may use: the machine's, or the tightest control group's."""
    return min([machine_bytes(root), *(limit for limit, _ in _limits(root))])


def available_bytes(root: Path = Path("/")) -> int:
    """Return the memory that can be allocated now without swapping, in bytes."""
    available = _meminfo(root).get("MemAvailable")
    if available is None:
        import psutil

        available = int(psutil.virtual_memory().available) if root == Path("/") else 0
    return max(0, min([available, *(limit - used for limit, used in _limits(root))]))


def _meminfo(root: Path) -> dict[str, int]:
    """Return ``/proc/meminfo`` in bytes, empty without it."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    return {key: int(kilobytes) * 1024 for key, kilobytes in re.findall(r"(?m)^(\w+):\s+(\d+) kB", text)}


def cgroup_files(root: Path, controller: str, name_v2: str, name_v1: str) -> list[Path]:
    """Return the existing control files of this process's group and its parents.

    Args:
        controller: of version 1, e.g. ``memory``.
        name_v2: file in version 2, e.g. ``memory.max``.
        name_v1: the same in version 1, e.g. ``memory.limit_in_bytes``.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    top = root / "sys/fs/cgroup"
    found: list[Path] = []
    for line in lines:
        _, controllers, group = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            base, name = top, name_v2
        elif controller in controllers.split(","):
            base, name = top / controller, name_v1
        else:
            continue
        # Inside a container the path may be the host's, of which only the last folder is mounted here.
        folder = base / group.lstrip("/")
        for parent in (folder, *folder.parents):
            if parent.is_relative_to(base) and (file := parent / name).is_file():
                found.append(file)
    return found


def _limits(root: Path) -> list[tuple[int, int]]:
    """Return ``(limit, used)`` in bytes of every control group above this process that has a limit.

    The used memory there includes the page cache, which is freed on demand, so it is subtracted.
    """
    limits = []
    for file in cgroup_files(root, "memory", "memory.max", "memory.limit_in_bytes"):
        limit = _number(file)
        used = _number(file.with_name("memory.current" if file.name == "memory.max" else "memory.usage_in_bytes"))
        if limit is not None and limit < _NO_LIMIT_BYTES:
            limits.append((limit, max(0, (used or 0) - _page_cache(file.with_name("memory.stat")))))
    return limits


def _page_cache(stat: Path) -> int:
    """Return the page cache in a group's ``memory.stat``; version 1 has totals that include subgroups."""
    try:
        rows = dict(line.split(" ", 1) for line in stat.read_text(encoding="ascii").splitlines())
        prefix = "total_" if "total_inactive_file" in rows else ""
        return sum(int(rows.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    except (OSError, ValueError):
        return 0


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii").strip())
    except (OSError, ValueError):  # "max": no limit
        return None

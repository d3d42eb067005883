"""How much memory there is for a model: what the machine has, or what a container's limit leaves of it.

A process that goes past its control group's limit is killed just as one that goes past the
machine's, so the smaller of both counts.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["available_bytes", "cgroup_files", "machine_bytes", "total_bytes"]

_NO_LIMIT_BYTES = 1 << 60  # what version 1 of control groups says in place of "max"


def machine_bytes(root: Path = Path("/")) -> int:
    """Return the machine's memory in bytes, as the kernel sees it; 0 if nothing tells."""
    if (kilobytes := _meminfo(root).get("MemTotal")) is not None:
        return kilobytes
    import psutil

    return int(psutil.virtual_memory().total) if root == Path("/") else 0


def total_bytes(root: Path = Path("/")) -> int:
    """Return the memory this process may use in all: the machine's, or the tightest control group's."""
    return min([machine_bytes(root), *(limit for limit, _ in _limits(root))])


def available_bytes(root: Path = Path("/")) -> int:
    """Return the memory that can be taken now without swapping, in bytes."""
    available = _meminfo(root).get("MemAvailable")
    if available is None:
        import psutil

        available = int(psutil.virtual_memory().available) if root == Path("/") else 0
    return max(0, min([available, *(limit - used for limit, used in _limits(root))]))


def _meminfo(root: Path) -> dict[str, int]:
    """Return ``/proc/meminfo`` in bytes, empty where there is none."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    return {key: int(kilobytes) * 1024 for key, kilobytes in re.findall(r"(?m)^(\w+):\s+(\d+) kB", text)}


def cgroup_files(root: Path, controller: str, name_v2: str, name_v1: str) -> list[Path]:
    """Return this process's control files, those of its group's parents included, that exist.

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

    Cached files count as used there although they are given up on demand, so they are subtracted.
    """
    limits = []
    for file in cgroup_files(root, "memory", "memory.max", "memory.limit_in_bytes"):
        limit = _number(file)
        used = _number(
            file.with_name("memory.current" if file.name == "memory.max" else "memory.usage_in_bytes")
        )
        if limit is not None and limit < _NO_LIMIT_BYTES:
            limits.append((limit, max(0, (used or 0) - _cached_files(file.with_name("memory.stat")))))
    return limits


def _cached_files(stat: Path) -> int:
    """Return the bytes of cached files in a group's ``memory.stat``; version 1 has totals of all groups below."""
    try:
        rows = dict(line.split(" ", 1) for line in stat.read_text(encoding="ascii").splitlines())
        prefix = "total_" if "total_inactive_file" in rows else ""
        return sum(int(rows.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    except (OSError, ValueError):
        return 0


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii").strip())
    except (OSError, ValueError):  # "max" is no number: no limit
        return None

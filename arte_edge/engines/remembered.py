"""What is measured once on a machine and then remembered: which layout, which engine is fastest here.

Which one wins depends on the processor. The choice moves results by rounding only, but a run
that goes on after an interruption should repeat its batches to the bit: so the first answer is
written down in the cache folder and stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from arte_edge.models.disk import whole_file
from arte_edge.models.home import locked, room

__all__ = ["fastest", "machine", "probing", "remembered"]

T = TypeVar("T")
Row = dict[str, Any]


def probing() -> bool:
    """Return whether anything may be measured; ``ARTE_EDGE_PROBE=0`` says no."""
    return os.environ.get("ARTE_EDGE_PROBE", "1") != "0"


def remembered(
    kind: str, facts: Sequence[object], read: Callable[[Row], T | None], measure: Callable[[], Row]
) -> T:
    """Return what `read` finds in the row of `kind` kept for `facts`; without one, in what `measure` returns.

    Args:
        kind: "layout" or the like; the rows are files in the cache folder's room of that name and an s.
        facts: everything that the answer depends on.
        read: turns a row into the answer; None: the row is of no use, measure again.
    """
    name = hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()[:24]
    path = room(f"{kind}s") / f"{name}.json"
    if (known := _known(path, read)) is not None:
        return known
    with locked(f"{kind}-{name}"):
        if (known := _known(path, read)) is not None:  # another process was first
            return known
        row = measure()
        found = read(row)
        assert found is not None
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(row) + "\n", "utf-8")
        return found


def fastest(seconds: Sequence[float], worth: float) -> int:
    """Return the place of the least, if it is less than `worth` times the first, which is the default; else 0."""
    best = min(range(len(seconds)), key=lambda i: seconds[i])
    return best if seconds[best] < worth * seconds[0] else 0


def machine() -> str:
    """Return what tells this kind of machine from another: the processor's name, its kind and its cores."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{platform.machine()} {name} {os.cpu_count()}"


def _known(path: Path, read: Callable[[Row], T | None]) -> T | None:
    try:
        return read(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None

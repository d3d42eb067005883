"""How fast this machine reads memory: a probe of about a second, kept for next time.

Each thread sums its own large array with numpy, which lets the threads run side by side; the best of
several passes counts, since anything else on the machine can only slow a pass down. The sum of
integers is limited by memory on every processor we know, so decoding cannot be faster than this figure.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["is_busy", "measure", "probe", "remembered"]

_FILE_NAME = "probes.json"
_MAX_BYTES = 512_000_000  # in all: past every cache of a small machine, and past those of most servers
_PASSES = 6
_LIMIT_S = 1.5


def probe(threads: int, *, fresh: bool = False) -> float:
    """Return the bytes a second that `threads` threads read from memory, from the last probe if there was one.

    Args:
        fresh: measure again, whatever is remembered of this machine.
    """
    return float(remembered("read_bandwidth", str(threads), lambda: measure(threads), fresh=fresh))


def measure(threads: int, total_bytes: int = 0) -> float:
    """Measure and return the read bandwidth in bytes/s.

    Args:
        total_bytes: size of all arrays together; 0: a quarter of what is free, at most 512 MB.
    """
    import numpy as np

    from arte_edge.device.memory import available_bytes

    total_bytes = total_bytes or min(_MAX_BYTES, available_bytes() // 4)
    share = max(1 << 20, total_bytes // threads) // 8
    arrays = [np.ones(share, dtype=np.int64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.sum, arrays))
        until_s = time.perf_counter() + _LIMIT_S
        for _ in range(_PASSES):
            start_s = time.perf_counter()
            list(pool.map(np.sum, arrays))
            best = max(best, share * 8 * threads / (time.perf_counter() - start_s))
            if time.perf_counter() > until_s:
                break
    return best


def remembered(kind: str, key: str, measured: Callable[[], Any], *, fresh: bool = False) -> Any:
    """Return what was measured on this machine under `kind` and `key`, or measure it now and keep it.

    Kept in the cache folder under the machine's fingerprint, so that a home shared by several
    machines does not mix them up. Nothing is kept of a machine that was busy with something else, and
    a cache that cannot be written costs the next probe, no more.
    """
    from arte_edge.cache import home
    from arte_edge.device.detect import detect

    path = home() / _FILE_NAME
    machine = detect().fingerprint
    if not fresh and (found := _load(path).get(machine, {}).get(kind, {}).get(key)) is not None:
        return found
    busy = is_busy()
    value = measured()
    if busy:  # good enough for now, and too low to be believed next time
        return value
    known = _load(path)
    known.setdefault(machine, {}).setdefault(kind, {})[key] = value
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    return value


def is_busy() -> bool:
    """Return whether other programs took more than half of the cores during the last minute."""
    if not hasattr(os, "getloadavg"):
        return False
    return os.getloadavg()[0] > max(1.0, (os.cpu_count() or 1) / 2)


def _load(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {machine: found for machine, found in known.items() if isinstance(found, dict)}

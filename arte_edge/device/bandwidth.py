"""How fast this machine reads memory: a probe of about a second, kept for next time.

Each thread sums its own large array with numpy, which lets the threads run side by side; the best of
several passes counts, since anything else on the machine can only slow a pass down. The sum of
integers is limited by memory on every processor we know, so decoding cannot be faster than this figure.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

__all__ = ["is_busy", "measure", "probe"]

_MAX_BYTES = 512_000_000  # in all: past every cache of a small machine, and past those of most servers
_PASSES = 6
_LIMIT_S = 1.5


def probe(threads: int, *, fresh: bool = False) -> float:
    """Return the bytes a second that `threads` threads read from memory, from the last probe if there was one.

    Args:
        fresh: measure again, whatever is remembered of this machine.
    """
    from arte_edge.cache import measured_once
    from arte_edge.device.detect import detect

    return measured_once(
        "bandwidth",
        [detect().fingerprint, threads],  # several machines may share a home folder
        read=lambda row: float(row["bytes_per_s"]),
        measure=lambda: {"bytes_per_s": measure(threads)},
        fresh=fresh,
        store=not is_busy(),  # a busy machine's rate is too low to be used again
    )


def measure(threads: int, total_bytes: int = 0) -> float:
    """Measure and return the read bandwidth in bytes/s.

    Args:
        total_bytes: size of all arrays together; 0: a quarter of what is free, at most 512 MB.
    """
    import numpy as np

    from arte_edge.memory import available_bytes

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


def is_busy() -> bool:
    """Return whether other programs took more than half of the cores during the last minute."""
    if not hasattr(os, "getloadavg"):
        return False
    return os.getloadavg()[0] > max(1.0, (os.cpu_count() or 1) / 2)

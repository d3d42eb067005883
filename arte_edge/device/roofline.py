"""Predicted decode rate: the bytes that one token reads, divided by the device's memory bandwidth.

    seconds a token = weight bytes / rate + KV-cache bytes / rate + layers * layer_s

`rate` is a published one (in the device's profile), or the read bandwidth measured on this machine, which
gives an upper bound: each thread sums its own large array with numpy, the best of several passes counts, and
the result is cached. The memory ceiling is the roofline of Williams, Waterman, Patterson (CACM 52:4, 2009);
the last term is the fixed cost of a layer, which matters for small models.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arte_edge.device.model_size import ModelSize
from arte_edge.device.profiles import Profile
from arte_edge.errors import InputError
from arte_edge.results.student_json import Artifact

_MAX_BYTES = 512_000_000  # of all arrays: larger than the caches of small machines and of most servers
_PASSES = 6
_LIMIT_S = 1.5


def bandwidth(threads: int, *, fresh: bool = False) -> float:
    """Return the read bandwidth of `threads` threads in bytes/s; measured once and cached, unless `fresh`."""
    from arte_edge.cache import cached_measurement
    from arte_edge.device.detect import detect

    return cached_measurement(
        "bandwidth",
        [detect().fingerprint, threads],  # several machines may share a home folder
        read=lambda row: float(row["bytes_per_s"]),
        measure=lambda: {"bytes_per_s": measure_bandwidth(threads)},
        fresh=fresh,
        store=not is_busy(),  # a busy machine's rate is too low to be reused
    )


def measure_bandwidth(threads: int) -> float:
    """Measure the read bandwidth in bytes/s, with arrays of a quarter of the available memory, at most 512 MB."""
    import numpy as np

    from arte_edge.machine import available_bytes

    share = max(1 << 20, min(_MAX_BYTES, available_bytes() // 4) // threads) // 8
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
    """Return whether other programs used more than half of the cores during the last minute."""
    if not hasattr(os, "getloadavg"):
        return False
    return os.getloadavg()[0] > max(1.0, (os.cpu_count() or 1) / 2)


Source = Literal["probe", "published", "assumed"]
# Share of the peak bandwidth that decoding reaches where both are known: 0.56 to 0.68 on a
# Raspberry Pi 5, 0.48 and 0.54 on an Intel N150 and a Ryzen AI 340, 0.78 on an M1 (see devices/*.toml).
_SHARE_OF_PEAK = 0.5
# Assumed fixed cost of a layer where it was not measured: a few microseconds for each of the dozen thread
# barriers of a layer. No published result is of a model small enough to show it.
_LAYER_S = 20e-6


@dataclass(frozen=True)
class Expected:
    """A prediction and its parts."""

    decode_tokens_per_s: float
    source: Source
    basis: str  # the source of the rate
    weights_s: float  # of one token
    kv_s: float
    overhead_s: float
    is_upper_bound: bool = False  # only memory reads count; a compute-bound kernel is slower


def expected(size: ModelSize, basis: Profile | float, context_tokens: int = 0) -> Expected | None:
    """Return the predicted decode rate of a model, None if the device's bandwidth is unknown.

    Args:
        basis: a device's profile, or a bandwidth measured on this machine in bytes/s.
        context_tokens: tokens already in the KV cache.
    """
    source: Source = "probe"
    overhead_s = size.n_layer * _LAYER_S
    if not isinstance(basis, Profile):
        rate, text = basis, f"measured read bandwidth, {basis / 1e9:.1f} GB/s"
    elif fact := basis.effective_bandwidth:
        rate, source = fact.value, "published" if fact.evidence != "assumed" else "assumed"
        text = f"{rate / 1e9:.1f} GB/s, {fact.evidence}: {fact.source}"
    elif fact := basis.peak_bandwidth:
        rate, source = fact.value * _SHARE_OF_PEAK, "assumed"
        text = f"half of the peak bandwidth of {fact.value / 1e9:.1f} GB/s ({fact.evidence}: {fact.source})"
    else:
        return None
    if isinstance(basis, Profile) and basis.token_overhead_s:
        overhead_s = basis.token_overhead_s.value
    weights_s, kv_s = size.token_bytes / rate, size.kv_bytes(context_tokens) / rate
    tokens_per_s = 1 / (weights_s + kv_s + overhead_s)
    return Expected(tokens_per_s, source, text, weights_s, kv_s, overhead_s, is_upper_bound=source == "probe")


def expected_here(size: ModelSize, threads: int, context_tokens: int = 0) -> Expected:
    """Return the upper bound on this machine from its memory bandwidth, which is measured once and cached."""
    found = expected(size, bandwidth(threads), context_tokens)
    assert found is not None  # a bandwidth is known
    return found


# Prefill is faster than decoding by a factor that depends on kernels more than on memory; this is the
# smallest one published for a Raspberry Pi 5 (nyunai's edge-llm-leaderboard, stable-code-3b Q4_K_M, four
# threads: 10.8 to 5.56 tokens/s).
PREFILL_FACTOR = 1.9


@dataclass(frozen=True)
class Prediction:
    """The prediction for a file on a device: rates in tokens/s, memory in bytes."""

    decode_tokens_per_s: float | None = None
    ram_bytes: int | None = None
    source: str = ""
    prefill_tokens_per_s: float | None = None
    prefill_source: str = ""


Predictor = Callable[[Artifact], Prediction | None]


def predictor(folder: Path, profile: Profile, context_tokens: int) -> Predictor:
    """Return a function that predicts the files in `folder` on the device, with `context_tokens` in the cache."""

    def predicted(artifact: Artifact) -> Prediction | None:
        path = folder / artifact.file
        if not path.exists():
            return None
        try:
            size = ModelSize.of(path)
        except InputError:  # an unknown layout
            return None
        return predict(size, profile, context_tokens)

    return predicted


def predict(size: ModelSize, profile: Profile, context_tokens: int) -> Prediction:
    """Return the prediction for a model of these sizes on the device."""
    from arte_edge.device.memory_estimate import fit_profile

    speed = expected(size, profile, context_tokens)
    found = fit_profile(size, profile, context_tokens)
    rate = speed.decode_tokens_per_s if speed else None
    return Prediction(
        rate,
        found.peak_bytes,  # comparable with a measured peak
        speed.basis if speed else "sizes in the file's header",
        rate and rate * PREFILL_FACTOR,
        f"assumed to be {PREFILL_FACTOR} times the decode rate",
    )

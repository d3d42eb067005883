"""Predicted decode rate: the bytes that one token reads, divided by the device's memory bandwidth.

    seconds a token = weight bytes / rate + KV-cache bytes / rate + layers * layer_s

`rate` is what somebody published for the device (its profile), or the read bandwidth measured on this
machine, which gives an upper bound: each thread sums its own large array with numpy, the best of
several passes counts, and the result is cached. The memory ceiling is the roofline of Williams,
Waterman, Patterson (CACM 52:4, 2009); the last term is what a small model loses below it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arte_edge.device.model_size import ModelShape
from arte_edge.device.profiles import Profile
from arte_edge.errors import InputError
from arte_edge.results.student_json import Artifact

__all__ = [
    "READS_FASTER",
    "Expected",
    "Prediction",
    "Predictor",
    "Source",
    "expected",
    "expected_here",
    "is_busy",
    "measure",
    "predict_shape",
    "predictor",
    "probe",
]

_MAX_BYTES = 512_000_000  # in all: past every cache of a small machine, and past those of most servers
_PASSES = 6
_LIMIT_S = 1.5


def probe(threads: int, *, fresh: bool = False) -> float:
    """Return the bytes a second that `threads` threads read from memory, from the last probe if there was one.

    Args:
        fresh: measure again, whatever is remembered of this machine.
    """
    from arte_edge.cache import cached_measurement
    from arte_edge.device.detect import detect

    return cached_measurement(
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


Source = Literal["probe", "published", "assumed"]
# Share of the peak bandwidth that decoding reached where both are known: 0.56 to 0.68 on a
# Raspberry Pi 5, 0.48 and 0.54 on an Intel N150 and a Ryzen AI 340, 0.78 on an M1 (see devices/*.toml).
_SHARE_OF_PEAK = 0.5
# Fixed cost of a layer where nobody measured it. None of the published rows is of a model small
# enough to show it; a few microseconds for each of the dozen thread barriers of a layer.
_LAYER_S = 20e-6


@dataclass(frozen=True)
class Expected:
    """A prediction and its parts."""

    decode_tokens_per_s: float
    source: Source
    basis: str  # where the rate comes from
    weights_s: float  # of one token
    kv_s: float
    overhead_s: float
    is_upper_bound: bool = False  # only memory reads are counted, and a compute-bound kernel is slower

    @property
    def token_s(self) -> float:
        return self.weights_s + self.kv_s + self.overhead_s


def expected(shape: ModelShape, basis: Profile | float, context_tokens: int = 0) -> Expected | None:
    """Return the predicted decode rate of a model, None if the device's bandwidth is unknown.

    Args:
        basis: a device's profile, or a bandwidth measured on this machine in bytes/s.
        context_tokens: tokens already in the KV cache.
    """
    if isinstance(basis, Profile):
        return _from_profile(shape, basis, context_tokens)
    return _from_bandwidth(shape, basis, context_tokens)


def expected_here(
    shape: ModelShape, threads: int, context_tokens: int = 0, *, fresh: bool = False
) -> Expected:
    """Return the upper bound on this machine from its memory bandwidth, which is measured once and cached.

    Args:
        fresh: measure again.
    """
    return _from_bandwidth(shape, probe(threads, fresh=fresh), context_tokens)


def _from_bandwidth(shape: ModelShape, bytes_per_s: float, context_tokens: int) -> Expected:
    basis = f"measured read bandwidth, {bytes_per_s / 1e9:.1f} GB/s"
    return _result(shape, "probe", basis, bytes_per_s, context_tokens, _LAYER_S, bound=True)


def _from_profile(shape: ModelShape, profile: Profile, context_tokens: int) -> Expected | None:
    source: Source
    if fact := profile.effective_bandwidth:
        rate, source = fact.value, "published" if fact.evidence != "assumed" else "assumed"
        basis = f"{rate / 1e9:.1f} GB/s, {fact.evidence}: {fact.source}"
    elif fact := profile.peak_bandwidth:
        rate, source = fact.value * _SHARE_OF_PEAK, "assumed"
        basis = f"half of the peak bandwidth of {fact.value / 1e9:.1f} GB/s ({fact.evidence}: {fact.source})"
    else:
        return None
    overhead = profile.token_overhead_s
    layer_s = overhead.value / max(1, shape.n_layer) if overhead else _LAYER_S
    return _result(shape, source, basis, rate, context_tokens, layer_s)


def _result(
    shape: ModelShape,
    source: Source,
    basis: str,
    bytes_per_s: float,
    context_tokens: int,
    layer_s: float,
    *,
    bound: bool = False,
) -> Expected:
    weights_s = shape.token_bytes / bytes_per_s
    kv_s, overhead_s = shape.kv_bytes(context_tokens) / bytes_per_s, shape.n_layer * layer_s
    rate = 1 / (weights_s + kv_s + overhead_s)
    return Expected(rate, source, basis, weights_s, kv_s, overhead_s, is_upper_bound=bound)


# Prompts are read faster than text is written. How much faster depends on kernels more than on
# memory, so no formula gives it; this is the least ratio published for a Raspberry Pi 5 (nyunai's
# edge-llm-leaderboard, stable-code-3b Q4_K_M, four threads: 10.8 to 5.56 tokens/s).
READS_FASTER = 1.9


@dataclass(frozen=True)
class Prediction:
    """What is predicted for a file on a device: rates in tokens/s, memory in bytes."""

    decode_tokens_per_s: float | None = None
    ram_bytes: int | None = None
    source: str = ""
    prefill_tokens_per_s: float | None = None
    prefill_source: str = ""


Predictor = Callable[[Artifact], Prediction | None]


def predictor(folder: Path, profile: Profile, context_tokens: int) -> Predictor:
    """Return what predicts the files in `folder` on the device, with `context_tokens` in the cache."""

    def predict(artifact: Artifact) -> Prediction | None:
        path = folder / artifact.file
        if not path.exists():
            return None
        try:
            shape = ModelShape.of(path)
        except InputError:  # a layout whose sizes we cannot read
            return None
        return predict_shape(shape, profile, context_tokens)

    return predict


def predict_shape(shape: ModelShape, profile: Profile, context_tokens: int) -> Prediction:
    """Return what is expected of a model of these sizes on the device."""
    from arte_edge.device.memory_estimate import fit

    speed = expected(shape, profile, context_tokens)
    found = fit(shape, profile.memory_bytes[0], context_tokens)
    rate = speed.decode_tokens_per_s if speed else None
    return Prediction(
        rate,
        found.peak_bytes,  # what a measured peak will be beside
        speed.basis if speed else "sizes in the file's header",
        rate and rate * READS_FASTER,
        f"assumed to be {READS_FASTER} times the decode rate",
    )

"""How fast a model should decode: the bytes of one token, over how fast the device gets through them.

    seconds a token = sum over types of bytes / rate + KV bytes / rate + layers * layer_s

(weights in the mapped file times 1.2 for the probe of the kernels, see `_MAPPED`),

where `rate` is what a probe of this machine measured (`kernels`: a rate for each weight type;
`bandwidth`: one for all), else what somebody published for the device. The ceiling that memory
sets is the roofline of Williams, Waterman, Patterson (CACM 52:4, 2009); the last term is what a
small model loses below it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from arte_edge.device.kernels import Kernels, measure_kernels
from arte_edge.device.profile import Profile
from arte_edge.device.shape import ModelShape
from arte_edge.errors import EngineError

__all__ = ["Expected", "Source", "expected", "expected_here", "probe_width", "types_that_matter"]

Source = Literal["probe", "published", "assumed"]

# Share of the memory's rate on paper that decoding reached where both are known: 0.56 to 0.68 on a
# Raspberry Pi 5, 0.48 and 0.54 on an Intel N150 and a Ryzen AI 340, 0.78 on an M1 (see devices/*.toml).
_SHARE_OF_PEAK = 0.5
# A layer's cost beside its bytes where nobody measured it. Of the published rows none is of a model
# small enough to tell; a few microseconds for each of the dozen times that its threads meet.
_LAYER_S = 20e-6


# Weights that stay in the mapped file take longer than the probe's zeros, by about as much for every
# type; repacked ones do not. The one constant here that was fitted to files: five of them, on the
# machine of benchmarks/results/roofline; to which types it applies was chosen with two more in view.
_MAPPED = 1.2


@dataclass(frozen=True)
class Expected:
    """A prediction, and what it is made of."""

    decode_tokens_per_s: float
    source: Source
    basis: str  # in words: whose rates
    weights_s: float  # of one token
    kv_s: float
    overhead_s: float
    is_upper_bound: bool = False  # only reading is counted: a slower kernel stays below

    @property
    def token_s(self) -> float:
        return self.weights_s + self.kv_s + self.overhead_s


def expected(shape: ModelShape, basis: Profile | Kernels | float, context_tokens: int = 0) -> Expected | None:
    """Return the expected decode rate of a model, None if nothing is known of the device's memory.

    Args:
        basis: a device's profile, what `measure_kernels` found on this machine, or bytes/s.
        context_tokens: tokens in the cache before the one that is written.
    """
    if isinstance(basis, Profile):
        return _from_profile(shape, basis, context_tokens)
    if isinstance(basis, Kernels):
        return _from_kernels(shape, basis, context_tokens)
    words = f"memory read at {basis / 1e9:.1f} GB/s by the probe"
    return _result(
        shape, "probe", words, shape.token_bytes / basis, basis, context_tokens, _LAYER_S, bound=True
    )


def expected_here(
    shape: ModelShape, threads: int, context_tokens: int = 0, *, fresh: bool = False
) -> Expected:
    """Return what to expect on this machine, probing it if it was not probed before.

    A GGUF file's types are probed one by one where llama-cpp-python is installed; for anything else
    only the memory is, and the result is an upper bound.
    """
    from arte_edge.device.bandwidth import probe

    found: Expected | None = None
    if shape.format == "gguf":
        try:
            kernels = measure_kernels(types_that_matter(shape), probe_width(shape), threads, fresh=fresh)
            found = expected(shape, kernels, context_tokens)
        except EngineError:  # another runtime is used here, or none
            found = None
    found = found or expected(shape, probe(threads, fresh=fresh), context_tokens)
    assert found is not None  # a rate always gives a result
    return found


def probe_width(shape: ModelShape) -> tuple[int, int]:
    """Return the width at which a model's kernels are probed: its own, the feed-forward's too if it says one."""
    return shape.n_embd, shape.n_ff or 3 * shape.n_embd


def types_that_matter(shape: ModelShape) -> list[str]:
    """Return the types with at least 2 % of a token's bytes, and F16 for the cache."""
    limit = shape.token_bytes / 50
    return sorted({"F16"} | {kind for kind, size in shape.token_bytes_by_type.items() if size >= limit})


def _from_kernels(shape: ModelShape, kernels: Kernels, context_tokens: int) -> Expected | None:
    rates = kernels.rates
    known = {kind: size for kind, size in shape.token_bytes_by_type.items() if kind in rates}
    if not known:
        return None
    seconds = sum(size / rates[kind] * factor(kernels, kind) for kind, size in known.items())
    seconds *= shape.token_bytes / sum(known.values())  # the few bytes of other types: the mean rate
    kv_rate = rates.get("F16", min(rates.values()))
    words = "rates of its weight types, measured here: " + ", ".join(
        f"{kind} {rates[kind] / 1e9:.1f} GB/s" for kind in sorted(known)
    )
    return _result(shape, "probe", words, seconds, kv_rate, context_tokens, kernels.layer_s)


def factor(kernels: Kernels, kind: str) -> float:
    """Return how much longer real weights of a type take than the zeros they were probed with."""
    return 1.0 if kind in kernels.copied else _MAPPED


def _from_profile(shape: ModelShape, profile: Profile, context_tokens: int) -> Expected | None:
    source: Source
    if fact := profile.effective_bandwidth:
        rate, source = fact.value, "published" if fact.evidence != "assumed" else "assumed"
        words = f"{rate / 1e9:.1f} GB/s, {fact.evidence}: {fact.source}"
    elif fact := profile.peak_bandwidth:
        rate, source = fact.value * _SHARE_OF_PEAK, "assumed"
        words = f"half of {fact.value / 1e9:.1f} GB/s on paper ({fact.evidence}: {fact.source})"
    else:
        return None
    overhead = profile.token_overhead_s
    layer_s = overhead.value / max(1, shape.n_layer) if overhead else _LAYER_S
    return _result(shape, source, words, shape.token_bytes / rate, rate, context_tokens, layer_s)


def _result(
    shape: ModelShape,
    source: Source,
    words: str,
    weights_s: float,
    kv_rate: float,
    context_tokens: int,
    layer_s: float,
    *,
    bound: bool = False,
) -> Expected:
    kv_s, overhead_s = shape.kv_bytes(context_tokens) / kv_rate, shape.n_layer * layer_s
    rate = 1 / (weights_s + kv_s + overhead_s)
    return Expected(rate, source, words, weights_s, kv_s, overhead_s, is_upper_bound=bound)

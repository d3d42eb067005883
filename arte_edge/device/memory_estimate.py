"""Will it fit: the memory a model takes against what the device has, before anything is copied there.

    weights + keys and values of the context + buffers of one batch + vocabulary + the process

What each part is taken from stands beside its constant. The weights of a GGUF are mapped from the
file; types that llama.cpp repacks for the processor are copied as well, and the mapped originals,
which are not read again, can be dropped by the system: they count in the peak and not in the need.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

from arte_edge.cache import megabytes
from arte_edge.device.model_size import ModelShape
from arte_edge.device.profiles import Profile
from arte_edge.errors import InputError

__all__ = ["Fit", "fit", "fit_profile", "refuse", "repacked_types"]

Verdict = Literal["fits", "tight", "no"]
_UBATCH_TOKENS = 512  # llama.cpp's default: the most tokens whose activations are held at once
# Held per token of a batch: three of the feed-forward's width, six of the model's, in f32. Measured as
# peak less loaded: 16.2 MB against 16.5 for SmolLM2-135M, 36 to 42 MB against 41 for Qwen2.5-0.5B.
_WIDE_VALUES, _NARROW_VALUES, _F32_BYTES = 3, 6, 4
_VOCAB_BYTES = 334  # of one token's text, score and maps; the two models above, 49152 and 151936 tokens
# Interpreter, libraries and our own code. Measured: 47 MB with llama.cpp alone, 101 MB with
# onnxruntime-genai (SmolLM2-135M int4, loaded less weights and vocabulary). Assumed with torch.
_PROCESS_BYTES = {
    "gguf": 60_000_000,
    "onnx-genai": 110_000_000,
    "onnx": 110_000_000,
    "safetensors": 500_000_000,
}
_TIGHT = 0.9  # above this share of the memory the first other program makes it swap
_STEP_TOKENS = 256


@dataclass(frozen=True)
class Fit:
    """What a model needs on a device, in bytes, and whether there is as much."""

    verdict: Verdict
    weight_bytes: int
    copy_bytes: int  # of repacked weights
    kv_bytes: int
    buffer_bytes: int
    vocab_bytes: int
    process_bytes: int
    context_tokens: int
    memory_bytes: int
    largest_context_tokens: int  # that would still fit, at most the model's own; 0: none

    @property
    def needed_bytes(self) -> int:
        """Below this it swaps or is killed."""
        return self.weight_bytes + self.kv_bytes + self.buffer_bytes + self.vocab_bytes + self.process_bytes

    @property
    def peak_bytes(self) -> int:
        """What the system will show as its peak, the repacked weights' originals included."""
        return self.needed_bytes + self.copy_bytes

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"needed_bytes": self.needed_bytes, "peak_bytes": self.peak_bytes}

    def in_words(self) -> str:
        """Return one sentence with the numbers."""
        parts = (
            f"{megabytes(self.weight_bytes)} weights + {megabytes(self.kv_bytes)} keys and values of "
            f"{self.context_tokens} tokens + "
            f"{megabytes(self.needed_bytes - self.weight_bytes - self.kv_bytes)} buffers and program"
        )
        has = f"{megabytes(self.needed_bytes)} of {megabytes(self.memory_bytes)}"
        return {"fits": "fits", "tight": "is tight", "no": "does not fit"}[
            self.verdict
        ] + f": {has} ({parts})"


def _batch_values(shape: ModelShape) -> int:
    """Return the activations held for each token of a batch, in values."""
    return _WIDE_VALUES * (shape.n_ff or 4 * shape.n_embd) + _NARROW_VALUES * shape.n_embd


def fit(
    shape: ModelShape,
    memory_bytes: int,
    context_tokens: int,
    *,
    repacked: Collection[str] = ("Q4_0", "Q4_K", "IQ4_NL"),
) -> Fit:
    """Return what a model needs for `context_tokens` tokens, against the memory there is for it.

    Args:
        memory_bytes: available to the process: `memory.available_bytes`, or a profile's less its system's.
        repacked: GGUF types that the runtime copies into another layout, see `repacked_types`.
    """
    is_gguf = shape.format == "gguf"
    copies = sum(shape.token_bytes_by_type.get(kind, 0) for kind in repacked) if is_gguf else 0
    values = _batch_values(shape)
    if is_gguf:
        buffers = (min(_UBATCH_TOKENS, context_tokens) * values + shape.n_vocab) * _F32_BYTES
    else:  # the whole prompt at once, with logits for each of its tokens
        buffers = context_tokens * (values + shape.n_vocab) * _F32_BYTES
    parts = {
        "weight_bytes": shape.weight_bytes,
        "copy_bytes": copies,
        "buffer_bytes": buffers,
        "vocab_bytes": shape.n_vocab * _VOCAB_BYTES,
        "process_bytes": _PROCESS_BYTES[shape.format],
    }
    needed = sum(parts.values()) - copies + shape.kv_bytes(context_tokens)
    verdict: Verdict = "no" if needed > memory_bytes else "fits"
    if verdict == "fits" and needed > _TIGHT * memory_bytes:
        verdict = "tight"
    return Fit(
        verdict=verdict,
        kv_bytes=shape.kv_bytes(context_tokens),
        context_tokens=context_tokens,
        memory_bytes=memory_bytes,
        largest_context_tokens=_largest_context(shape, memory_bytes, needed, context_tokens),
        **parts,
    )


def fit_profile(shape: ModelShape, profile: Profile, context_tokens: int) -> Fit:
    """Return `fit` for a profile's usual memory, less what the system keeps of it."""
    memory_bytes = max(0, profile.memory_bytes[0] - profile.system_bytes)
    return fit(shape, memory_bytes, context_tokens, repacked=repacked_types(profile.arch, profile.features))


def repacked_types(arch: str, features: Collection[str]) -> tuple[str, ...]:
    """Return the GGUF types that llama.cpp repacks for a processor.

    x86 with AVX2: seen here with llama-cpp-python 0.3.36. ARM with dot products: llama.cpp PR 17494,
    18096, 19356, 19360; a file whose types an older build does not repack needs less than we say.
    """
    if arch == "x86_64":
        return ("Q4_0", "Q4_K", "IQ4_NL") if "avx2" in features else ()
    if {"asimddp", "i8mm"} & set(features):
        return ("Q4_0", "Q4_K", "IQ4_NL", "Q5_K", "Q6_K", "Q8_0")
    return ()


def refuse(shape: ModelShape, found: Fit, where: str) -> InputError:
    """Return the error for a model that does not fit, with what would."""
    if found.largest_context_tokens:
        hint = f"A context of {found.largest_context_tokens} tokens fits."
    else:
        room = found.memory_bytes - (found.needed_bytes - found.weight_bytes - found.kv_bytes)
        room -= shape.kv_bytes(min(_STEP_TOKENS, found.context_tokens))
        hint = (
            f"Weights of up to {megabytes(room)} fit: export a smaller type, or take a smaller student."
            if room > 0
            else "No model of this kind fits: the program alone needs more."
        )
    return InputError(f"{shape.name} on {where} {found.in_words()}", hint)


def _largest_context(shape: ModelShape, memory_bytes: int, needed_bytes: int, context_tokens: int) -> int:
    """Return the largest context that fits, in steps of 256 tokens and at most what the model was made for."""
    a_token = shape.kv_bytes(1)
    if shape.format != "gguf":
        a_token += (_batch_values(shape) + shape.n_vocab) * _F32_BYTES
    tokens = context_tokens + (memory_bytes - needed_bytes) // max(1, a_token)
    if tokens <= 0:
        return 0
    limit = shape.n_ctx_train or 1 << 20
    if tokens >= limit:
        return limit
    return tokens if tokens < _STEP_TOKENS else tokens // _STEP_TOKENS * _STEP_TOKENS

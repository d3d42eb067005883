"""Does a model fit: the memory it needs against what the device has, before anything is copied there.

    weights + keys and values of the context + buffers of one batch + vocabulary + the process

The source of each part is beside its constant. The weights of a GGUF are mapped from the file; types that
llama.cpp repacks for the processor are copied as well. The system can drop the mapped originals, which are not
read again, so they count in the peak but not in the need. A weight that onnxruntime holds twice counts twice.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

from arte_edge.cache import megabytes
from arte_edge.device.model_size import ModelSize
from arte_edge.device.profiles import Profile
from arte_edge.errors import InputError

Verdict = Literal["fits", "tight", "no"]
_UBATCH_TOKENS = 512  # llama.cpp's default: the most tokens whose activations are held at once
# Held per token of a batch: three of the feed-forward's width, six of the model's, in f32. Measured as
# peak less loaded: 16.2 MB against 16.5 for SmolLM2-135M, 36 to 42 MB against 41 for Qwen2.5-0.5B.
_WIDE_VALUES, _NARROW_VALUES, _F32_BYTES = 3, 6, 4
_VOCAB_BYTES = 334  # of one token's text, score and maps; the two models above, 49152 and 151936 tokens
# Interpreter, libraries and our own code. Measured: 47 MB with llama.cpp alone, 101 MB with
# onnxruntime-genai (SmolLM2-135M int4, loaded less weights and vocabulary). Assumed with torch.
_PROCESS_BYTES = {"gguf": 60_000_000, "onnx-genai": 110_000_000, "onnx": 110_000_000, "safetensors": 500_000_000}
_TIGHT = 0.9  # above this share of the memory any other program makes it swap
_STEP_TOKENS = 256


@dataclass(frozen=True)
class Fit:
    """The memory that a model needs on a device, in bytes, and whether there is enough."""

    verdict: Verdict
    weight_bytes: int
    copy_bytes: int  # of repacked weights
    kv_bytes: int
    buffer_bytes: int
    vocab_bytes: int
    process_bytes: int
    context_tokens: int
    memory_bytes: int
    largest_context_tokens: int  # that fits, at most the model's own; 0: none

    @property
    def needed_bytes(self) -> int:
        """With less memory it swaps or is killed."""
        return self.weight_bytes + self.kv_bytes + self.buffer_bytes + self.vocab_bytes + self.process_bytes

    @property
    def peak_bytes(self) -> int:
        """The peak that the system will report, the originals of repacked weights included."""
        return self.needed_bytes + self.copy_bytes

    def as_json(self) -> dict[str, Any]:
        sums = {"needed_bytes": self.needed_bytes, "peak_bytes": self.peak_bytes}
        return asdict(self) | sums | {"in_words": self.summary()}

    def summary(self) -> str:
        """Return the verdict with its numbers as one sentence."""
        verdict = {"fits": "fits", "tight": "is tight", "no": "does not fit"}[self.verdict]
        rest = self.needed_bytes - self.weight_bytes - self.kv_bytes
        return (
            f"{verdict}: {megabytes(self.needed_bytes)} of {megabytes(self.memory_bytes)} "
            f"({megabytes(self.weight_bytes)} weights + {megabytes(self.kv_bytes)} keys and values of "
            f"{self.context_tokens} tokens + {megabytes(rest)} buffers and program)"
        )


def _batch_values(size: ModelSize) -> int:
    """Return the activations held for each token of a batch, in values."""
    return _WIDE_VALUES * (size.n_ff or 4 * size.n_embd) + _NARROW_VALUES * size.n_embd


def fit(
    size: ModelSize, memory_bytes: int, context_tokens: int, *, repacked: Collection[str] = ("Q4_0", "Q4_K", "IQ4_NL")
) -> Fit:
    """Return the memory that a model needs, against `memory_bytes` available; `repacked`: see `repacked_types`."""
    is_gguf = size.format == "gguf"
    copies = sum(size.token_bytes_by_type.get(kind, 0) for kind in repacked) if is_gguf else 0
    values = _batch_values(size)
    if is_gguf:
        buffers = (min(_UBATCH_TOKENS, context_tokens) * values + size.n_vocab) * _F32_BYTES
    else:  # the whole prompt at once, with logits for every token
        buffers = context_tokens * (values + size.n_vocab) * _F32_BYTES
    parts = {
        "weight_bytes": size.weight_bytes + size.folded_bytes,
        "copy_bytes": copies,
        "buffer_bytes": buffers,
        "vocab_bytes": size.n_vocab * _VOCAB_BYTES,
        "process_bytes": _PROCESS_BYTES[size.format],
    }
    needed = sum(parts.values()) - copies + size.kv_bytes(context_tokens)
    verdict: Verdict = "no" if needed > memory_bytes else "fits"
    if verdict == "fits" and needed > _TIGHT * memory_bytes:
        verdict = "tight"
    return Fit(
        verdict=verdict,
        kv_bytes=size.kv_bytes(context_tokens),
        context_tokens=context_tokens,
        memory_bytes=memory_bytes,
        largest_context_tokens=_largest_context(size, memory_bytes, needed, context_tokens),
        **parts,
    )


def fit_profile(size: ModelSize, profile: Profile, context_tokens: int) -> Fit:
    """Return `fit` for a profile's usual memory, less what the system uses."""
    memory_bytes = max(0, profile.memory_bytes[0] - profile.system_bytes)
    return fit(size, memory_bytes, context_tokens, repacked=repacked_types(profile.arch, profile.features))


def repacked_types(arch: str, features: Collection[str]) -> tuple[str, ...]:
    """Return the GGUF types that llama.cpp repacks for a processor.

    x86 with AVX2: observed with llama-cpp-python 0.3.36. ARM with dot products: llama.cpp PR 17494,
    18096, 19356, 19360; an older build repacks fewer types and needs less.
    """
    if arch == "x86_64":
        return ("Q4_0", "Q4_K", "IQ4_NL") if "avx2" in features else ()
    if {"asimddp", "i8mm"} & set(features):
        return ("Q4_0", "Q4_K", "IQ4_NL", "Q5_K", "Q6_K", "Q8_0")
    return ()


def does_not_fit(size: ModelSize, found: Fit, where: str) -> InputError:
    """Return the error for a model that does not fit; its hint says what would fit."""
    if found.largest_context_tokens:
        hint = f"A context of {found.largest_context_tokens} tokens fits."
    else:
        room = found.memory_bytes - (found.needed_bytes - found.weight_bytes - found.kv_bytes)
        room -= size.kv_bytes(min(_STEP_TOKENS, found.context_tokens))
        hint = (
            f"Weights of up to {megabytes(room)} fit: export a smaller type, or take a smaller student."
            if room > 0
            else "No model of this kind fits: the program alone needs more."
        )
    return InputError(f"{size.name} on {where} {found.summary()}", hint)


def _largest_context(size: ModelSize, memory_bytes: int, needed_bytes: int, context_tokens: int) -> int:
    """Return the largest context that fits, in steps of 256 tokens and at most the model's own."""
    token_bytes = size.kv_bytes(1)
    if size.format != "gguf":
        token_bytes += (_batch_values(size) + size.n_vocab) * _F32_BYTES
    tokens = context_tokens + (memory_bytes - needed_bytes) // max(1, token_bytes)
    if tokens <= 0:
        return 0
    limit = size.n_ctx_train or 1 << 20
    if tokens >= limit:
        return limit
    return tokens if tokens < _STEP_TOKENS else tokens // _STEP_TOKENS * _STEP_TOKENS

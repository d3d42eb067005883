"""Rotary scaling, from config.json to what llama.cpp reads in a GGUF file, and back.

In llama.cpp ``linear`` and ``yarn`` are a few keys; Llama 3's scaling is a tensor of divisors, one for each pair of a
head's dimensions; Phi's ``longrope`` is two such tensors, for short and long contexts, and a factor. For the families
that we write llama.cpp reads no other key of ``rope.scaling.*`` (llama-model.cpp, llama-context.cpp): a YaRN with other
bounds than the usual ones, or without rounding them, would be computed with the usual ones, and is rejected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import InputError
from arte_edge.gguf.reader import FLOAT32, STRING, UINT32, Field, GgufHeader
from arte_edge.gguf.writer import Tensor

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_YARN_ONLY: dict[str, tuple[Any, ...]] = {  # all that llama.cpp computes, and what stands for it in config.json
    "beta_fast": (32, None, 0),
    "beta_slow": (1, None, 0),
    "truncate": (True,),
}
_NUMBERS = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": ("original_max_position_embeddings",),
}
_WHOLE = "Give a whole checkpoint."
_SAME_FACTORS = 1e-5  # relative: divisors that differ by rounding


def settings(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return ``rope``, the scaling of full attention, and the flat keys inside it.

    Args:
        raw: config.json, with the family's defaults.

    Raises InputError: the scaling is not a table.
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    try:
        local = dict(rope.get("sliding_attention") or {})
        rope = dict(rope.get("full_attention") or rope)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{where}: the rotary scaling is {rope!r}, not a table", _WHOLE) from error
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_type"] = "longrope" if kind == "su" else kind  # what longrope was called first
    original = "original_max_position_embeddings"
    # As in transformers: the key outside has priority, and the whole context is the last resort.
    rope[original] = raw.get(original) or rope.get(original) or raw.get("max_position_embeddings")
    if kind == "yarn" and rope.get("factor") is None and "factor" in rope and rope[original]:
        rope["factor"] = raw.get("max_position_embeddings", 0) / rope[original]
    found: dict[str, Any] = {"rope": rope}
    for key in ("rope_theta", "partial_rotary_factor", original):
        if rope.get(key) is not None:
            found[key] = rope[key]
    if theta := local.get("rope_theta") or raw.get("rope_local_base_freq"):
        found["rope_theta_local"] = theta
    return found


def check(config: Mapping[str, Any], where: str) -> None:
    """Raise unless llama.cpp computes the scaling of these settings as transformers does.

    Raises InputError: a number is missing, or a setting that llama.cpp does not read; names it.
    """
    rope = config["rope"]
    kind = rope["rope_type"]
    for key in _NUMBERS.get(kind, ()):
        value = rope.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{where}: {key} of the {kind} rotary scaling is {value!r}", _WHOLE)
    for key, values in _YARN_ONLY.items() if kind == "yarn" else ():
        if rope.get(key, values[0]) not in values:
            raise InputError(
                f"{where}: {key} of the yarn rotary scaling is {rope[key]!r}; llama.cpp computes "
                f"{str(values[0]).lower()} only",
                "The file would load and answer wrongly. Use this model through another runtime.",
            )
    for name in ("long", "short") if kind == "longrope" else ():
        factors, expected = rope.get(f"{name}_factor"), config["rotary_dim"] // 2
        if not isinstance(factors, list) or len(factors) != expected:
            n = len(factors) if isinstance(factors, list) else 0
            raise InputError(f"{where}: {name}_factor has {n} numbers, not {expected}", _WHOLE)


def fields(config: Mapping[str, Any], arch: str) -> dict[str, Field]:
    """Return ``<arch>.rope.scaling.*`` for settings that passed `check`."""
    rope = config["rope"]
    kind = rope["rope_type"]
    found: dict[str, Field] = {}
    if kind in ("linear", "yarn"):
        found["type"] = Field(STRING, kind.encode())
        found["factor"] = Field(FLOAT32, float(rope["factor"]))
    if kind == "yarn":
        found["original_context_length"] = Field(UINT32, int(rope["original_max_position_embeddings"]))
        # llama.cpp multiplies by YaRN's own scale, whatever the file says.
        scale = _yarn_attention(rope) / _yarn_scale(rope["factor"])
        if abs(scale - 1) > 1e-7:
            found["attn_factor"] = Field(FLOAT32, scale)
    if kind == "longrope":
        found["attn_factor"] = Field(FLOAT32, _longrope_attention(config))
    return {f"{arch}.rope.scaling.{key}": field for key, field in found.items()}


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention(rope: Mapping[str, Any]) -> float:
    """Return the factor of cosines and sines (YaRN, arXiv 2309.00071, as transformers has it)."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    factor, mscale, all_dim = rope["factor"], rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and all_dim:
        return _yarn_scale(factor, mscale) / _yarn_scale(factor, all_dim)
    return _yarn_scale(factor)


def _longrope_attention(config: Mapping[str, Any]) -> float:
    """Return the attention scale of longrope (LongRoPE, arXiv 2402.13753, as transformers has it)."""
    rope = config["rope"]
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def tensors(config: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors of a scaling that passed `check`: none, Llama 3's divisors or Phi's two sets."""
    rope = config["rope"]
    if rope["rope_type"] == "llama3":
        dim = config.get("head_dim") or config["hidden_per_head"]
        return [_tensor(FREQS, _llama3_factors(rope, config["rope_theta"], dim))]
    if rope["rope_type"] != "longrope":
        return []
    pairs = ((LONG, rope["long_factor"]), (SHORT, rope["short_factor"]))
    return [_tensor(name, np.array(factors, dtype=np.float32)) for name, factors in pairs]


def _tensor(name: str, values: NDArray[np.float32]) -> Tensor:
    return Tensor(name, values.shape, "F32", lambda: values)


def _llama3_factors(rope: Mapping[str, Any], theta: float, dim: int) -> NDArray[np.float32]:
    """Return the divisor of each rotary frequency, ``[dim / 2]``.

    `factor` for long waves, 1 for short ones, and a smooth transition between (Llama 3.1's own code,
    `apply_scaling`). Every step is rounded to float32, as torch did where the model was made.
    """
    one, factor = np.float32(1.0), np.float32(rope["factor"])
    low, high = np.float32(rope["low_freq_factor"]), np.float32(rope["high_freq_factor"])
    length, waves = np.float32(rope["original_max_position_embeddings"]), _waves(theta, dim)
    smooth = (length / waves - low) / (high - low)
    with np.errstate(divide="ignore"):
        between = one / ((one - smooth) / factor + smooth)
    factors = np.where(waves < length / high, one, np.where(waves > length / low, factor, between))
    return factors.astype(np.float32)


def _waves(theta: float, dim: int) -> NDArray[np.float32]:
    """Return the wavelength of each pair of dimensions in tokens, ``[dim / 2]``."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    waves: NDArray[np.float32] = np.float32(2 * math.pi) / (np.float32(1.0) / np.power(np.float32(theta), exponents))
    return waves


def restored(header: GgufHeader) -> dict[str, Any]:
    """Return the rotary scaling of a GGUF file as ``rope_parameters`` of config.json; empty without scaling.

    transformers reads it for one architecture only, and gives the others none.

    Raises InputError: a scaling that transformers has no settings for.
    """
    arch = header.architecture

    def number(key: str, default: float) -> float:
        value = header.metadata.get(f"{arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InputError(f"{header.path}: {arch}.{key} is {value!r}, not a number that it can be", _ORIGINAL)
        return value

    kind = header.metadata.get(f"{arch}.rope.scaling.type", "linear")
    factor = number("rope.scaling.factor", 0) or number("rope.scale_linear", 0) or 1.0
    original = int(number("rope.scaling.original_context_length", 0) or header.context_tokens)
    attention = number("rope.scaling.attn_factor", 1.0)
    found: dict[str, Any] = {}
    if kind == "yarn":
        scale = {} if attention == 1 else {"attention_factor": attention * _yarn_scale(factor)}
        found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original} | scale
    elif kind == "linear" and factor != 1:
        found = {"rope_type": "linear", "factor": factor}
    elif kind not in ("linear", "none", "longrope"):
        raise InputError(f"{header.path}: unknown rotary scaling '{kind}'", _ORIGINAL)
    divisors = header.floats(FREQS).ravel() if FREQS in header.tensors else np.ones(1, np.float32)
    if not (divisors == 1).all():
        if found:
            what = f"{FREQS} beside a {kind} scaling"
            raise InputError(f"{header.path}: transformers has no such rotary scaling: {what}", _ORIGINAL)
        found = _llama3_settings(header, divisors, number("rope.freq_base", 10_000.0), original)
    if LONG in header.tensors and SHORT in header.tensors:
        long, short = (header.floats(name).ravel().tolist() for name in (LONG, SHORT))
        found = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        return found | {"original_max_position_embeddings": original, "attention_factor": float(attention)}
    if attention != 1 and kind != "yarn":
        what = f"{arch}.rope.scaling.attn_factor {attention:g} without yarn"
        raise InputError(f"{header.path}: transformers has no such rotary scaling: {what}", _ORIGINAL)
    return found


_ORIGINAL = "Give the original checkpoint (a folder or its Hub id) instead."


def _llama3_settings(header: GgufHeader, divisors: NDArray[np.float32], theta: float, context: int) -> dict[str, Any]:
    """Return settings of Llama 3's formula that give these `divisors`, which the file has in place of them.

    With f the largest divisor, (1/d - 1/f) / (1 - 1/f) is a line over 1/wavelength between 0 and 1: its two
    parameters determine the divisors, so one of the formula's three is free, and the lower bound is 1 where
    that gives a whole context length.
    """
    factor = float(divisors.max())
    if not np.isfinite(divisors).all() or divisors.min() < 1 or theta <= 1:
        raise InputError(f"{header.path}: {FREQS} holds other values than divisors", _ORIGINAL)
    waves = _waves(theta, 2 * len(divisors)).astype(np.float64)
    if np.allclose(divisors, factor, rtol=_SAME_FACTORS):
        return {"rope_type": "linear", "factor": factor}
    share = (1 / divisors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    inside = np.flatnonzero((divisors > 1) & (divisors < factor))
    # Of what lies beside the transition only the nearest count: the line is at most 0 and at least 1 there.
    ends = [int(np.flatnonzero(divisors >= factor).min(initial=len(waves))), int((divisors <= 1).sum()) - 1]
    x = 1 / waves
    if len(inside) > 1:
        one, two = inside[0], inside[-1]
        slope = (share[one] - share[two]) / (x[one] - x[two])
    else:
        known = [i for i in (*ends, *inside.tolist()) if 0 <= i < len(waves)]
        pairs = [(i, j) for i in known for j in known if i < j]
        slope = max((share[i] - share[j]) / (x[i] - x[j]) for i, j in pairs)
        one = inside[0] if len(inside) else known[0]
    offset = share[one] - slope * x[one]
    sound = math.isfinite(slope) and slope > 0 > offset
    for length in (round(-slope / offset), context) if sound else ():
        low = float(-offset * length / slope)
        high = float(low + length / slope)
        for digits in (3, 12):
            found: dict[str, Any] = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": round(low, digits),
                "high_freq_factor": round(high, digits),
                "original_max_position_embeddings": int(length),
            }
            if 0 < found["low_freq_factor"] < found["high_freq_factor"] and np.allclose(
                _llama3_factors(found, theta, 2 * len(divisors)), divisors, rtol=_SAME_FACTORS, atol=0
            ):
                return found
    raise InputError(f"{header.path}: {FREQS} does not follow Llama 3's rotary scaling", _ORIGINAL)

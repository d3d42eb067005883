"""A checkpoint's settings as GGUF metadata: what the family file names, and the rotary scaling.

Rotary scaling has forms of its own in llama.cpp: ``linear`` and ``yarn`` are a few
keys; Llama 3's is a tensor of divisors, one for each pair of a head's dimensions;
Phi's ``longrope`` is two such tensors, for short and for long contexts, and a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import InputError
from arte_edge.export.gguf.checkpoint import Checkpoint
from arte_edge.models.gguf_fields import Field
from arte_edge.models.gguf_write import Tensor

__all__ = ["FLOAT32", "STRING", "UINT32", "hyper_parameters", "rope_tensors"]

# GGUF value types
UINT32, FLOAT32, STRING = 4, 6, 8
_YARN = {  # config key -> GGUF key below rope.scaling.
    "extrapolation_factor": "yarn_ext_factor",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def hyper_parameters(checkpoint: Checkpoint) -> dict[str, Field]:
    """Return ``<arch>.*``, everything llama.cpp needs to build the graph.

    Raises:
        InputError: config.json lacks a key, or it holds no number.
    """
    family, where = checkpoint.family, checkpoint.folder / "config.json"
    fields: dict[str, Field] = {}
    kinds: tuple[tuple[dict[str, str], int, Callable[[Any], Any]], ...] = (
        (family.uint32, UINT32, int),
        (family.float32, FLOAT32, float),
    )
    for table, kind, number in kinds:
        for key, name in table.items():
            value = checkpoint.config.get(name.removesuffix("?"))
            if value is None and name.endswith("?"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"{where}: {name} is {value!r}, not a number", "Give a whole checkpoint.")
            fields[f"{family.arch}.{key}"] = Field(kind, number(value))
    if family.rope_keys:
        scaling = _scaling_keys(checkpoint.config, str(where))
        fields |= {f"{family.arch}.rope.scaling.{key}": field for key, field in scaling.items()}
    elif checkpoint.config["rope"]["rope_type"] == "longrope":
        factor = _longrope_factor(checkpoint.config)
        fields[f"{family.arch}.rope.scaling.attn_factor"] = Field(FLOAT32, factor)
    return fields


def _scaling_keys(config: dict[str, Any], where: str) -> dict[str, Field]:
    rope = config["rope"]
    if rope["rope_type"] not in ("linear", "yarn"):
        return {}
    try:
        fields = {
            "type": Field(STRING, rope["rope_type"].encode()),
            "factor": Field(FLOAT32, float(rope["factor"])),
        }
        if rope["rope_type"] == "yarn":
            length = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
            fields["original_context_length"] = Field(UINT32, int(length))
            fields |= {
                key: Field(FLOAT32, float(rope[name]))
                for name, key in _YARN.items()
                if rope.get(name) is not None
            }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: rotary scaling lacks {error}", "Give a whole checkpoint.") from error
    return fields


def rope_tensors(checkpoint: Checkpoint) -> list[Tensor]:
    """Return the tensors that a rotary scaling has in GGUF: none, Llama 3's factors or Phi's two sets.

    Raises:
        InputError: they are missing in config.json, or not one for each pair of dimensions.
    """
    kind = checkpoint.config["rope"]["rope_type"]
    if kind == "llama3":
        return [_tensor("rope_freqs.weight", _llama3_factors(checkpoint.config))]
    if kind != "longrope":
        return []
    found = []
    for name in ("long", "short"):
        factors = np.array(checkpoint.config["rope"].get(f"{name}_factor") or [], dtype=np.float32)
        if len(factors) * 2 != checkpoint.config["rotary_dim"]:
            raise InputError(
                f"{checkpoint.folder / 'config.json'}: {name}_factor has {len(factors)} numbers, "
                f"not {checkpoint.config['rotary_dim'] // 2}",
                "Give a whole checkpoint.",
            )
        found.append(_tensor(f"rope_factors_{name}.weight", factors))
    return found


def _tensor(name: str, values: NDArray[np.float32]) -> Tensor:
    return Tensor(name, values.shape, "F32", lambda: values)


def _llama3_factors(config: dict[str, Any]) -> NDArray[np.float32]:
    """Return by how much each rotary frequency is divided, ``[head_dim / 2]``.

    Long waves by `factor`, short ones not at all, and smoothly between (Llama 3.1's own code,
    `apply_scaling`). Every step is rounded to float32, as torch does it where the model was made.
    """
    rope, dim = config["rope"], config.get("head_dim") or config["hidden_per_head"]
    one, factor, low, high, length = (
        np.float32(number)
        for number in (
            1.0,
            rope.get("factor", 8.0),
            rope.get("low_freq_factor", 1.0),
            rope.get("high_freq_factor", 4.0),
            rope.get("original_max_position_embeddings", 8192),
        )
    )
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    waves = np.float32(2 * math.pi) / (one / np.power(np.float32(config["rope_theta"]), exponents))
    smooth = (length / waves - low) / (high - low)
    with np.errstate(divide="ignore"):
        between = one / ((one - smooth) / factor + smooth)
    factors = np.where(waves < length / high, one, np.where(waves > length / low, factor, between))
    return factors.astype(np.float32)


def _longrope_factor(config: dict[str, Any]) -> float:
    """Return by how much longrope scales attention (LongRoPE, arXiv 2402.13753, as transformers has it)."""
    if (given := config["rope"].get("attention_factor")) is not None:
        return float(given)
    scale = config["max_position_embeddings"] / config["original_max_position_embeddings"]
    if scale <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(scale) / math.log(config["original_max_position_embeddings"]))

"""A checkpoint's settings as GGUF metadata: hyper-parameters, rotary scaling, and ``general.*``.

Rotary scaling has forms of its own in llama.cpp: ``linear`` and ``yarn`` are a few keys; Llama 3's is a tensor
of divisors, one for each pair of a head's dimensions; Phi's ``longrope`` is two such tensors, for short and for
long contexts, and a factor.

``general.*`` describes the file to people and to hubs, from the checkpoint's own card and settings. Names of
folders are left out, though llama.cpp's converter uses them: a run's folder says nothing about the model, and
a path of the user's machine must not be in a published file. The exporter adds its own keys over these.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import InputError
from arte_edge.gguf.convert.checkpoint import Checkpoint
from arte_edge.gguf.reader import Field
from arte_edge.gguf.types import ARRAY, FLOAT32, QUANT_TYPES, STRING, UINT32
from arte_edge.gguf.writer import Tensor

__all__ = ["general_metadata", "hyper_parameters", "rope_tensors"]

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# generation_config.json -> gguf.Metadata
_SAMPLING = {
    "top_k": "sampling_top_k",
    "top_p": "sampling_top_p",
    "min_p": "sampling_min_p",
    "temperature": "sampling_temp",
}
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
    """Return the divisor of each rotary frequency, ``[head_dim / 2]``.

    `factor` for long waves, 1 for short ones, and a smooth transition between (Llama 3.1's own code,
    `apply_scaling`). Every step is rounded to float32, as torch did where the model was made.
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
    """Return the attention scale of longrope (LongRoPE, arXiv 2402.13753, as transformers has it)."""
    if (given := config["rope"].get("attention_factor")) is not None:
        return float(given)
    scale = config["max_position_embeddings"] / config["original_max_position_embeddings"]
    if scale <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(scale) / math.log(config["original_max_position_embeddings"]))


def general_metadata(checkpoint: Checkpoint, tensors: Sequence[Tensor], dtype: str) -> dict[str, Field]:
    """Return ``general.*`` for a file with these tensors.

    Raises:
        InputError: the front matter of the model card is not YAML.
    """
    import gguf

    n_parameter = sum(math.prod(tensor.shape) for tensor in tensors)
    try:
        card = gguf.Metadata.load_model_card(checkpoint.folder)
    except Exception as error:  # yaml's errors, of a dependency of gguf
        readme = checkpoint.folder / "README.md"
        raise InputError(f"{readme}: its front matter is not valid YAML", "Fix or remove it.") from error
    logging.getLogger("metadata").setLevel(logging.ERROR)
    about = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, {}, None, n_parameter)
    _add_sampling(about, gguf.Metadata.load_generation_config(checkpoint.folder))
    about.size_label = about.size_label or gguf.size_label(n_parameter, n_parameter, 0, 0)
    about.name = about.name or f"{checkpoint.family.title} {about.size_label}"
    writer = gguf.GGUFWriter(None, checkpoint.family.arch)
    about.set_gguf_meta_model(writer)
    found = {key: _field(value) for key, value in writer.kv_data[0].items() if key != "general.architecture"}
    return {
        "general.type": Field(STRING, b"model"),
        **found,
        "general.file_type": Field(UINT32, QUANT_TYPES[dtype].number),
        "general.quantization_version": Field(UINT32, _QUANTIZATION_VERSION),
    }


def _add_sampling(about: Any, generation: dict[str, Any]) -> None:
    """Copy the sampling settings that the model's authors recommend."""
    for name, attribute in _SAMPLING.items():
        value = generation.get(name)
        if isinstance(value, int | float) and hasattr(about, attribute):
            setattr(about, attribute, value)


def _field(value: Any) -> Field:
    """Convert a value of the `gguf` package."""
    from gguf import GGUFValueType

    kind, content = GGUFValueType(value.type), value.value
    if kind != GGUFValueType.ARRAY:
        return Field(int(kind), content.encode() if isinstance(content, str) else content)
    item = GGUFValueType.get_type(content[0])
    items = [part.encode() if isinstance(part, str) else part for part in content]
    return Field(ARRAY, items, int(item))

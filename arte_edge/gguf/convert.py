"""A transformers checkpoint to a GGUF file, in this process and without torch, or by llama.cpp's own script.

The family's TOML maps its settings and rows, GGML's `gguf` has the tensors' names, and the weights stream from file to
file a few megabytes at a time, so memory does not grow with the model. The numbers are bit for bit those of llama.cpp's
own converter; see benchmarks/gguf_conversion.py and the tests. For models without a family file,
`convert_with_llama_cpp` runs ``convert_hf_to_gguf.py`` of the user's own checkout of llama.cpp with this Python; it
needs torch, transformers and what its requirements file lists.

config.json has been written in several ways: rotary settings flat, nested or by kind of layer, a head's width given or
implied, defaults left out. Here they become one flat table whose keys the family files name, and settings that
llama.cpp computes differently from transformers are rejected. Rotary scaling in llama.cpp: ``linear`` and ``yarn`` are
a few keys; Llama 3's is a tensor of divisors, one for each pair of a head's dimensions; Phi's ``longrope`` is two such
tensors, for short and long contexts, and a factor.

``general.*`` describes the file to people and to hubs, from the checkpoint's own card and settings. Names of folders
are left out, though llama.cpp's converter uses them: a path of the user's machine must not be in a published file. The
exporter adds its own keys over these.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arte_edge.cache import atomic_file
from arte_edge.checkpoint import Weight, read_config, read_weights
from arte_edge.errors import ArteError, InputError, reading
from arte_edge.extras import need
from arte_edge.gguf.names import (
    BLOCK,
    OTHER_CONVERTER,
    Family,
    Layout,
    family_of_model_type,
    name_for_llama_cpp,
    tensor_position,
    weight_tensor,
)
from arte_edge.gguf.reader import (
    ARRAY,
    FLOAT32,
    FULL_WIDTH,
    QUANT_TYPES,
    STRING,
    UINT32,
    Field,
    read_model_header,
)
from arte_edge.gguf.tokenizer import read_tokenizer, vocabulary
from arte_edge.gguf.writer import Tensor, write_gguf

__all__ = ["SCRIPT", "convert", "convert_with_llama_cpp"]

SCRIPT = "convert_hf_to_gguf.py"
_SHOWN_LINES = 3
_NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
# The tensors that llama.cpp cannot do without, whatever the family
_NEEDED = ("token_embd.weight", "output_norm.weight")
_PHI3_TOKENS = {b"</s>", b"<unk>", b"<s>", b"<|endoftext|>"}
_EMBEDDING = "model.embed_tokens.weight"
_OUTPUT = "lm_head.weight"
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


def convert(
    checkpoint: Path,
    out: Path,
    dtype: Literal["F16", "BF16", "F32"] = "F16",
    *,
    extra_fields: Mapping[str, Field] = MappingProxyType({}),
) -> Path:
    """Write the model in the folder `checkpoint` to the GGUF file `out`; return `out`.

    Norms, biases and rotary factors stay F32, as llama.cpp requires. The file appears whole or not at all.

    Args:
        dtype: the type of the matrices.
        extra_fields: metadata that overrides the checkpoint's.

    Raises:
        InputError: no whole checkpoint with a tokenizer, a family or a tokenizer we do not know, or
            settings that llama.cpp does not have for the family; says which file and key.
        ArteError: a package is missing, the disk is full, or a weight does not fit `dtype`.
    """
    need("gguf", "Writing GGUF")
    _check_dtype(dtype)
    with reading(checkpoint / "config.json", "Give a whole checkpoint."):
        source = _open_checkpoint(checkpoint)
        files = read_tokenizer(checkpoint, source.config)
        tensors = _rope_tensors(source) + _tensors(source, dtype)
        fields = {
            **_general_metadata(source, tensors, dtype),
            **_hyper_parameters(source),
            **vocabulary(files, source.family, source.n_vocab),
            **extra_fields,
        }
    strips = any(token.strips_right and token.special for token in files.added.values())
    is_phi3 = strips and set(fields["tokenizer.ggml.tokens"].value) >= _PHI3_TOKENS
    fields["general.name"] = Field(STRING, name_for_llama_cpp(fields["general.name"].value, is_phi3))
    return write_gguf(out, source.family.arch, fields, tensors)


def _tensors(source: _Checkpoint, dtype: str) -> list[Tensor]:
    """Return the tensors of the weights, block by block."""
    layout = source.layout
    named: dict[str, Weight] = {}
    for name, weight in source.weights.items():
        if name.endswith(_NOT_WEIGHTS):
            continue
        if (target := layout.gguf_name(name)) is None:
            what = f"{weight.path}: {name} has no place in a {source.family.title} GGUF"
            raise InputError(what, OTHER_CONVERTER)
        named[target] = weight
    _check_whole(source, named)
    return [weight_tensor(layout, name, named[name], dtype) for name in sorted(named, key=tensor_position)]


def _check_whole(source: _Checkpoint, named: dict[str, Weight]) -> None:
    """Raise for a tensor that is missing or does not fit the settings: a runtime would not name it."""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, weight in named.items():
        if match := BLOCK.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = weight.shape
    first = layers.get(0, {})
    missing = [name for name in _NEEDED if name not in named]
    for layer in range(source.layout.n_layer):
        missing += [f"blk.{layer}.{part}" for part in first.keys() - layers.get(layer, {}).keys()]
    if missing or not first:
        raise InputError(
            f"{source.folder}: {sorted(missing)[0] if missing else 'blk.0'} is missing in the weights",
            "Give a whole checkpoint, with every shard.",
        )
    hidden, heads = source.config["hidden_size"], source.layout
    width = source.config.get("head_dim") or source.config["hidden_per_head"]
    expected = {"attn_q.weight": heads.n_head * width, "attn_k.weight": heads.n_head_kv * width}
    for layer, parts in sorted(layers.items()):
        for part, shape in parts.items():
            rows = expected.get(part, shape[0])
            if shape != first.get(part) or shape[0] != rows or (part in expected and shape[1] != hidden):
                raise InputError(
                    f"{source.folder}: {named[f'blk.{layer}.{part}'].name} is {list(shape)}, "
                    "which does not fit config.json and the other layers",
                    "Save model and config together: model.save_pretrained(…).",
                )


def _check_dtype(dtype: str) -> None:
    if dtype not in FULL_WIDTH:
        raise InputError(f"'{dtype}' is not a type to convert to", f"Choose from {', '.join(FULL_WIDTH)}.")


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint whose family and settings are known. `config` has `rope`, the rotary scaling, beside the rest."""

    folder: Path
    family: Family
    config: dict[str, Any]
    weights: dict[str, Weight]

    @property
    def layout(self) -> Layout:
        """Head counts and names, for laying the tensors out."""
        counts = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return Layout(self.family.arch, *(self.config[key] for key in counts))

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding: how many tokens the GGUF must list."""
        return self.weights[_EMBEDDING].shape[0]


def _open_checkpoint(folder: Path) -> _Checkpoint:
    """Read and check config.json and the tables of the weights in `folder`.

    Raises:
        InputError: not a checkpoint, a family we do not know, a setting that llama.cpp does not
            have for this family, quantized weights, or tensors that do not fit the settings.
    """
    raw = read_config(folder)
    where = str(folder / "config.json")
    try:
        family = family_of_model_type(raw.get("model_type"), where)
    except InputError as error:
        raise InputError(error.message, f"{error.hint} {OTHER_CONVERTER}") from None
    if raw.get("quantization_config"):
        hint = "Give the 16-bit checkpoint that it was made from."
        raise InputError(f"{folder}: its weights are quantized already", hint)
    config = _flat(raw, family, where)
    _check_settings(config, family, where)
    weights = _without_tied_output(folder, config, read_weights(folder))
    return _Checkpoint(folder, family, config, weights)


def _flat(raw: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Return the settings under the names that family files use."""
    config = family.defaults | {key: value for key, value in raw.items() if value is not None}
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    local = rope.get("sliding_attention") or {}
    rope = dict(rope.get("full_attention") or rope)
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] == "su":  # what longrope was called first
        rope["rope_type"] = "longrope"
    config["rope"] = rope
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if key in rope:
            config[key] = rope[key]
    if theta := local.get("rope_theta") or raw.get("rope_local_base_freq"):
        config["rope_theta_local"] = theta
    try:
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        config["hidden_per_head"] = config["hidden_size"] // config["num_attention_heads"]
        if "head_dim?" not in family.uint32.values():
            config.setdefault("head_dim", config["hidden_per_head"])
        share = config.get("partial_rotary_factor", 1.0)
        config["rotary_dim"] = int(share * config["hidden_size"]) // config["num_attention_heads"]
        config["num_hidden_layers"] = int(config["num_hidden_layers"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: {error} is missing or no number", "Give a whole checkpoint.") from error
    return config


def _check_settings(config: dict[str, Any], family: Family, where: str) -> None:
    """Raise for a setting with which llama.cpp and transformers compute different results."""

    def rejected(key: str, value: object, allowed: object) -> InputError:
        return InputError(
            f"{where}: {key} is {value!r}; llama.cpp computes {family.title} with {allowed} only",
            "The file would load and answer wrongly. Use this model through another runtime.",
        )

    for key, values in family.must.items():
        if key in config and config[key] not in values:
            raise rejected(key, config[key], " or ".join(map(repr, values)))
    for key, others in family.same.items():
        if key in config and all(config[key] != config.get(other) for other in others):
            raise rejected(key, config[key], f"the value of {' or '.join(others)}")
    for key, pattern in family.patterns.items():
        expected = pattern.expected(config["num_hidden_layers"])
        if key in config and list(config[key])[: len(expected)] != expected:
            raise rejected(key, config[key], f"{pattern.value!r} at every {pattern.every}th layer")
    if config["rope"]["rope_type"] not in family.rope_types:
        raise rejected("rope_type", config["rope"]["rope_type"], " or ".join(family.rope_types))


def _without_tied_output(
    folder: Path, config: dict[str, Any], weights: dict[str, Weight]
) -> dict[str, Weight]:
    """Return the weights without an output matrix that is tied to the embedding and so never read."""
    if _EMBEDDING not in weights:
        raise InputError(f"{folder}: {_EMBEDDING} is missing", "Give a whole checkpoint of a language model.")
    rows = weights[_EMBEDDING].shape[0]
    if config.get("vocab_size", rows) != rows:
        raise InputError(
            f"{folder}: vocab_size is {config['vocab_size']}, but the embedding has {rows} rows",
            "Save model and config together: model.save_pretrained(…).",
        )
    config["vocab_size"] = rows
    if config.get("tie_word_embeddings", _OUTPUT not in weights):
        return {name: weight for name, weight in weights.items() if name != _OUTPUT}
    if _OUTPUT not in weights:
        what = f"{folder}: {_OUTPUT} is missing and tie_word_embeddings is false"
        raise InputError(what, "Give a whole checkpoint.")
    return weights


def _hyper_parameters(checkpoint: _Checkpoint) -> dict[str, Field]:
    """Return ``<arch>.*``, everything llama.cpp needs to build the graph.

    Raises:
        InputError: config.json lacks a key, or it holds no number.
    """
    family, where = checkpoint.family, checkpoint.folder / "config.json"
    fields: dict[str, Field] = {}
    for key, name in (*family.uint32.items(), *family.float32.items()):
        value = checkpoint.config.get(name.removesuffix("?"))
        if value is None and name.endswith("?"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where}: {name} is {value!r}, not a number", "Give a whole checkpoint.")
        whole = key in family.uint32
        fields[f"{family.arch}.{key}"] = Field(UINT32, int(value)) if whole else Field(FLOAT32, float(value))
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
            given = {key: rope[name] for name, key in _YARN.items() if rope.get(name) is not None}
            fields |= {key: Field(FLOAT32, float(value)) for key, value in given.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: rotary scaling lacks {error}", "Give a whole checkpoint.") from error
    return fields


def _rope_tensors(checkpoint: _Checkpoint) -> list[Tensor]:
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
        expected = checkpoint.config["rotary_dim"]
        if len(factors) * 2 != expected:
            counts = f"{name}_factor has {len(factors)} numbers, not {expected // 2}"
            raise InputError(f"{checkpoint.folder / 'config.json'}: {counts}", "Give a whole checkpoint.")
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
    one, factor = np.float32(1.0), np.float32(rope.get("factor", 8.0))
    low, high = np.float32(rope.get("low_freq_factor", 1.0)), np.float32(rope.get("high_freq_factor", 4.0))
    length = np.float32(rope.get("original_max_position_embeddings", 8192))
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


def _general_metadata(checkpoint: _Checkpoint, tensors: Sequence[Tensor], dtype: str) -> dict[str, Field]:
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
    sampling = gguf.Metadata.load_generation_config(checkpoint.folder)
    for name, attribute in _SAMPLING.items():  # what the model's authors recommend
        if isinstance(value := sampling.get(name), int | float) and hasattr(about, attribute):
            setattr(about, attribute, value)
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


def _field(value: Any) -> Field:
    """Convert a value of the `gguf` package."""
    from gguf import GGUFValueType

    kind, content = GGUFValueType(value.type), value.value
    if kind != GGUFValueType.ARRAY:
        return Field(int(kind), content.encode() if isinstance(content, str) else content)
    item = GGUFValueType.get_type(content[0])
    items = [part.encode() if isinstance(part, str) else part for part in content]
    return Field(ARRAY, items, int(item))


def convert_with_llama_cpp(llama_cpp: Path, checkpoint: Path, out: Path, dtype: str = "F16") -> Path:
    """Write the model in `checkpoint` to the GGUF file `out` by the converter in `llama_cpp`; return `out`.

    Raises:
        InputError: `llama_cpp` has no converter, or `checkpoint` is no folder.
        ArteError: the converter failed, or what it wrote is not a GGUF of type `dtype`.
    """
    script = llama_cpp / SCRIPT
    if not script.is_file():
        raise InputError(f"{llama_cpp}: no {SCRIPT} there", "Give the folder of a checkout of llama.cpp.")
    _check_dtype(dtype)
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such folder", "Give a transformers checkpoint.")
    # The script fills {…} in names itself, and adds nothing to a name without one.
    partial = out.with_name(f".{out.name}.partial".replace("{", "_").replace("}", "_"))
    command = [sys.executable, str(script.absolute()), str(checkpoint.absolute())]
    command += ["--outfile", str(partial.absolute()), "--outtype", dtype.lower()]
    with atomic_file(out, partial):
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "errors": "replace"}
        done = subprocess.run(command, **pipes, env=environment, check=False)
        if done.returncode != 0 or not partial.is_file():
            raise _failure(script, done)
        _check_written(script, partial, dtype)
    return out


def _failure(script: Path, done: subprocess.CompletedProcess[str]) -> ArteError:
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    output = " / ".join(lines[-_SHOWN_LINES:])[:500] or "no message"
    hint = f"Run it by hand to see its whole output: python {script.name} CHECKPOINT."
    if "ModuleNotFoundError" in output or "ImportError" in output:
        hint = f"Install what it needs: pip install -r {script.parent / 'requirements.txt'}"
    return ArteError(f"{script} ended with code {done.returncode}: {output}", hint)


def _check_written(script: Path, partial: Path, dtype: str) -> None:
    """Raise unless the file is a whole GGUF whose matrices are of type `dtype`."""
    try:
        header = read_model_header(partial)
    except InputError as error:
        raise ArteError(f"{script} wrote no usable GGUF: {error.message}", error.hint) from error
    if header.metadata.get("general.file_type") != QUANT_TYPES[dtype].number:
        raise ArteError(f"{script} wrote {header.quantization} instead of {dtype}", "Update the checkout.")

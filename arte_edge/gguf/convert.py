"""A transformers checkpoint to a GGUF file, in this process and without torch, or by llama.cpp's own script.

The family's TOML maps its settings and rows, GGML's `gguf` has the tensors' names, and the weights stream from file to
file a few megabytes at a time, so memory does not grow with the model. The numbers are bit for bit those of llama.cpp's
own converter. For models without a family file, `convert_with_llama_cpp` runs the user's own checkout of llama.cpp.

config.json has been written in several ways: rotary settings flat, nested or by kind of layer, a head's width given or
implied, defaults left out. Here they become one flat table whose keys the family files name, and settings that
llama.cpp computes differently from transformers are rejected (rotary scaling: `rope`).

``general.*`` describes the file to people and to hubs, from the checkpoint's own card and settings. Names of folders
are left out, though llama.cpp's converter uses them: a path of the user's machine must not be in a published file. The
exporter adds its own keys over these.
"""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from arte_edge.cache import atomic_file
from arte_edge.checkpoint import EMBEDDING, OUTPUT, Weight, check_tied, read_config, read_weights, reject_quantized
from arte_edge.errors import ArteError, InputError, reading
from arte_edge.extras import need
from arte_edge.gguf import rope
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
from arte_edge.gguf.reader import ARRAY, FLOAT32, QUANT_TYPES, STRING, UINT32, Field, read_model_header
from arte_edge.gguf.tokenizer import read_tokenizer, vocabulary
from arte_edge.gguf.writer import Tensor, write_gguf

_SCRIPT = "convert_hf_to_gguf.py"
_SHOWN_LINES = 3
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Keys of a model card from which gguf makes metadata, and whose values may be a path.
_CARD_KEYS = {"base_model", "base_models", "datasets", "dataset", "tags", "license_link", "name", "model_name", "url"}
_NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
# The tensors that llama.cpp cannot do without, whatever the family
_NEEDED = ("token_embd.weight", "output_norm.weight")
_PHI3_TOKENS = {b"</s>", b"<unk>", b"<s>", b"<|endoftext|>"}
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# generation_config.json -> gguf.Metadata
_SAMPLING = {
    "top_k": "sampling_top_k",
    "top_p": "sampling_top_p",
    "min_p": "sampling_min_p",
    "temperature": "sampling_temp",
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
    with reading(checkpoint / "config.json", "Give a whole checkpoint."):
        source = open_checkpoint(checkpoint)
        files = read_tokenizer(checkpoint, source.config)
        tensors = source.tensors(dtype)
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


def _check_whole(source: Checkpoint, named: dict[str, Weight]) -> None:
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


@dataclass(frozen=True)
class Checkpoint:
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
        return self.weights[EMBEDDING].shape[0]

    def tensors(self, dtype: str) -> list[Tensor]:
        """Return the tensors of the rotary scaling and of the weights, block by block.

        Raises InputError: a tensor is unknown, missing, or does not fit the settings.
        """
        layout, named = self.layout, dict[str, Weight]()
        for name, weight in self.weights.items():
            if name.endswith(_NOT_WEIGHTS):
                continue
            if (target := layout.gguf_name(name)) is None:
                what = f"{weight.path}: {name} has no place in a {self.family.title} GGUF"
                raise InputError(what, OTHER_CONVERTER)
            named[target] = weight
        _check_whole(self, named)
        found = [weight_tensor(layout, name, weight, dtype) for name, weight in named.items()]
        return sorted([*rope.tensors(self.config), *found], key=lambda tensor: tensor_position(tensor.name))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check config.json and the tables of the weights in `folder`."""
    raw = read_config(folder)
    where = str(folder / "config.json")
    try:
        family = family_of_model_type(raw.get("model_type"), where)
    except InputError as error:
        raise InputError(error.message, f"{error.hint} {OTHER_CONVERTER}") from None
    reject_quantized(folder, "the checkpoint")
    config = _flat(raw, family, where)
    _check_settings(config, family, where)
    weights = _without_tied_output(folder, config, read_weights(folder))
    return Checkpoint(folder, family, config, weights)


def _flat(raw: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Return the settings under the names that family files use."""
    config = family.defaults | {key: value for key, value in raw.items() if value is not None}
    config |= rope.settings(config, where)
    try:
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        config["hidden_per_head"] = config["hidden_size"] // config["num_attention_heads"]
        if "head_dim?" not in family.uint32.values():
            config.setdefault("head_dim", config["hidden_per_head"])
        share = config.get("partial_rotary_factor", 1.0)
        config["rotary_dim"] = int(share * config["hidden_size"]) // config["num_attention_heads"]
        config["num_hidden_layers"] = int(config["num_hidden_layers"])
        if not 0 < config["num_hidden_layers"] < 10_000:
            what = f"{where}: num_hidden_layers is {config['num_hidden_layers']}, as in no model"
            raise InputError(what, "Give a whole checkpoint.")
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
    rope.check(config, where)


def _without_tied_output(folder: Path, config: dict[str, Any], weights: dict[str, Weight]) -> dict[str, Weight]:
    """Return the weights without an output matrix that is tied to the embedding and so never read."""
    if EMBEDDING not in weights:
        raise InputError(f"{folder}: {EMBEDDING} is missing", "Give a whole checkpoint of a language model.")
    rows = weights[EMBEDDING].shape[0]
    if config.get("vocab_size", rows) != rows:
        raise InputError(
            f"{folder}: vocab_size is {config['vocab_size']}, but the embedding has {rows} rows",
            "Save model and config together: model.save_pretrained(…).",
        )
    config["vocab_size"] = rows
    if config.get("tie_word_embeddings", False):
        check_tied(folder, True)
        return {name: weight for name, weight in weights.items() if name != OUTPUT}
    if OUTPUT not in weights:
        what = f"{folder}: {OUTPUT} is missing and tie_word_embeddings is not true"
        raise InputError(what, "Set the key in config.json if the model is tied; else give a whole checkpoint.")
    return weights


def _hyper_parameters(checkpoint: Checkpoint) -> dict[str, Field]:
    """Return ``<arch>.*``, everything llama.cpp needs to build the graph."""
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
    return fields | rope.fields(checkpoint.config, family.arch)


def _general_metadata(checkpoint: Checkpoint, tensors: Sequence[Tensor], dtype: str) -> dict[str, Field]:
    """Return ``general.*`` for a file with these tensors."""
    import gguf

    n_parameter = sum(math.prod(tensor.shape) for tensor in tensors)
    card, _ = public_card(checkpoint.folder)
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


def public_card(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the front matter of a checkpoint's model card without what names no public place, and the keys of that.

    PEFT and TRL write the path of a local base model or data set where the Hub has an id.

    Raises InputError: the front matter is not YAML.
    """
    import gguf

    try:
        card = gguf.Metadata.load_model_card(folder)
    except Exception as error:  # yaml's errors, of a dependency of gguf
        raise InputError(f"{folder / 'README.md'}: its front matter is not valid YAML", "Fix or remove it.") from error
    kept: dict[str, Any] = {}
    dropped = []
    for key, value in card.items():
        values = value if isinstance(value, list) else [value]
        public = [one if isinstance(one, dict) else str(one) for one in values if _is_public(str(key), one, folder)]
        if len(public) < len(values) and value is not None:
            dropped.append(str(key))
        if public:
            kept[str(key)] = public if isinstance(value, list) else public[0]
    return kept, tuple(sorted({*dropped} & _CARD_KEYS))


def _is_public(key: str, value: Any, folder: Path) -> bool:
    if isinstance(value, dict):
        return key.endswith("_sources")
    if not isinstance(value, str | int | float):
        return False
    text = str(value)
    if text.startswith("https://"):
        return "@" not in text
    if key == "tags":  # such as base_model:adapter:ORG/NAME
        text = text.rpartition(":")[2]
    elif not key.startswith(("base_model", "dataset")):
        plain = key.endswith(("name", "link", "url", "finetune", "basename"))
        return not (plain and ("/" in text or "\\" in text))
    if "/" not in text and "\\" not in text:
        return not (folder / text).exists() or key == "tags"
    return _HUB_ID.fullmatch(text) is not None and not Path(text).exists() and not (folder / text).exists()


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
        InputError: `llama_cpp` has no converter.
        ArteError: the converter failed, or what it wrote is not a GGUF of type `dtype`.
    """
    script = llama_cpp / _SCRIPT
    if not script.is_file():
        raise InputError(f"{llama_cpp}: no {_SCRIPT} there", "Give the folder of a checkout of llama.cpp.")
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

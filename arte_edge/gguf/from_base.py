"""Write a fine-tuned checkpoint as GGUF, with the metadata of the GGUF file its base came from.

Fine-tuning changes weights and nothing else: the tokenizer, the chat template and the hyper-parameters are the
base's. Copying them from the base file keeps the student's prompts byte for byte those the base was measured
with, and needs no converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from arte_edge.checkpoint import Weight, read_weights
from arte_edge.errors import InputError
from arte_edge.gguf.metadata import rewrite
from arte_edge.gguf.names import (
    Layout,
    checkpoint_family,
    is_phi3_name,
    layout_of,
    name_for_llama_cpp,
    tensor_position,
    weight_tensor,
)
from arte_edge.gguf.reader import Field, GgufHeader, read_model_header
from arte_edge.gguf.types import QUANT_TYPES, STRING, UINT32
from arte_edge.gguf.writer import Tensor, write_gguf

__all__ = ["checkpoint_to_gguf", "with_metadata"]

# What is no longer true of the new file. `quantize.` holds paths of the machine that made the base.
_STALE = (
    "general.architecture",
    "general.file_type",
    "general.alignment",
    "general.quantized_by",
    "quantize.",
    "split.",
)


# What describes the publication of the base and is not true of a student made from it.
_PUBLICATION = (
    "arte_edge.",
    *(f"general.{key}" for key in ("author", "basename", "description", "doi", "finetune", "organization")),
    *(
        f"general.{key}"
        for key in ("repo_url", "url", "uuid", "version", "base_model.", "dataset.", "source.")
    ),
)


def checkpoint_to_gguf(
    checkpoint: Path, base_gguf: Path, out: Path, dtype: Literal["F16", "BF16", "F32"] = "F16"
) -> Path:
    """Write the weights in the folder `checkpoint` to the GGUF file `out`; return `out`.

    Norms and biases stay F32, as llama.cpp requires. The file appears whole or not at all.

    Raises:
        InputError: a family we do not know, or a checkpoint that is not a fine-tuned `base_gguf`
            (another architecture, other tensors, other shapes).
        ArteError: the disk is full, or a weight does not fit `dtype`.
    """
    base = read_model_header(base_gguf)
    layout = layout_of(base)
    if (arch := checkpoint_family(checkpoint)) != layout.arch:
        raise InputError(f"{checkpoint}: is {arch}, but {base_gguf} is {layout.arch}", _SAME_BASE)
    sources = read_weights(checkpoint)
    names = _checked_names(base, layout, sources)
    tensors = [_tensor(base, layout, name, sources[source], dtype) for source, name in names.items()]
    tensors += [_copied(base, name) for name in base.tensors if name.startswith("rope_")]
    tensors.sort(key=lambda tensor: tensor_position(tensor.name))
    fields = {key: field for key, field in base.fields.items() if not key.startswith(_STALE)}
    fields["general.file_type"] = Field(UINT32, QUANT_TYPES[dtype].number)
    return write_gguf(out, layout.arch, fields, tensors)


def with_metadata(student: Path, fields: Mapping[str, Field], out: Path) -> Path:
    """Write a copy of the file `student`, which `checkpoint_to_gguf` made, with `fields` to `out`; return `out`.

    Raises:
        InputError: not a GGUF, or a key or value that it cannot hold.
        ArteError: the disk is full.
    """
    name, old = fields.get("general.name"), read_model_header(student).field("general.name")
    if name is not None and old is not None:
        renamed = name_for_llama_cpp(name.value, is_phi3=is_phi3_name(old.value))
        fields = {**fields, "general.name": Field(STRING, renamed)}
    rewrite(student, fields, _PUBLICATION, out=out)
    return out


_SAME_BASE = "Give the GGUF file that the checkpoint was converted from before it was trained."


def _checked_names(base: GgufHeader, layout: Layout, sources: dict[str, Weight]) -> dict[str, str]:
    """Return checkpoint name -> GGUF name, or raise for tensors that do not match the base.

    `output.weight` may come or go: some files hold a tied output matrix twice.
    """
    names = {source: name for source in sources if (name := layout.gguf_name(source)) is not None}
    unknown = [source for source in sources if source not in names]
    missing = {name for name in base.tensors if not name.startswith("rope_")} ^ set(names.values())
    if unknown or missing - {"output.weight"}:
        odd = (unknown + sorted(missing - {"output.weight"}))[0]
        raise InputError(f"'{odd}' is not both in the checkpoint and in {base.path}", _SAME_BASE)
    return names


def _tensor(base: GgufHeader, layout: Layout, name: str, weight: Weight, dtype: str) -> Tensor:
    expected = base.tensors[name if name in base.tensors else "token_embd.weight"].shape
    if weight.shape != expected:
        raise InputError(
            f"{weight.path}: {weight.name} is {list(weight.shape)}, in {base.path} {list(expected)}",
            _SAME_BASE,
        )
    return weight_tensor(layout, name, weight, dtype)


def _copied(base: GgufHeader, name: str) -> Tensor:
    """Return a tensor that only the base holds: rotary factors, derived from the config elsewhere."""
    return Tensor(name, base.tensors[name].shape, "F32", lambda: base.floats(name))

"""Write what was trained from a base GGUF as GGUF: a fine-tuned checkpoint, or a LoRA adapter.

Fine-tuning changes neither tokenizer nor hyper-parameters: copied from the base file they need no converter. The chat
template, which holds a student's instruction, and the rotary scaling are the checkpoint's: training used those.

llama.cpp applies an adapter to the running base model, so an aligned teacher needs no copy of its weights: the file
that generated the first data generates the tailored data, with a few megabytes beside it. The adapter is then applied
to quantized weights, not to the 16-bit ones it was trained with; a run measures the teacher as it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arte_edge.checkpoint import Weight, read_tensors
from arte_edge.errors import InputError
from arte_edge.gguf import rope
from arte_edge.gguf.convert import open_checkpoint
from arte_edge.gguf.names import Layout, is_phi3_name, layout_of, name_for_llama_cpp
from arte_edge.gguf.reader import FLOAT32, QUANT_TYPES, STRING, UINT32, Field, GgufHeader, read_model_header
from arte_edge.gguf.tokenizer import template_fields
from arte_edge.gguf.writer import Tensor, rewrite, widened, write_gguf
from arte_edge.model_folder import ADAPTER_WEIGHTS, chat_templates, read_adapter_config, tokenizer_files

# Not true of the new file. `quantize.` holds paths of the machine that made the base.
_STALE = tuple(f"general.{key}" for key in ("architecture", "file_type", "alignment", "quantized_by"))
_STALE += ("quantize.", "split.")
# Describes the publication of the base, not a student made from it.
_ABOUT = "author basename description doi finetune organization repo_url url uuid version base_model. dataset. source."
_PUBLICATION = ("arte_edge.", *(f"general.{key}" for key in _ABOUT.split()))
_SAME_BASE = "Give the GGUF file that the checkpoint was converted from before it was trained."
_PREFIX = "base_model.model."
# Settings of adapter_config.json that a GGUF adapter cannot express, so they must be off.
_PLAIN = ("use_dora", "use_rslora", "fan_in_fan_out", "alpha_pattern", "modules_to_save", "layer_replication")


def checkpoint_to_gguf(
    checkpoint: Path, base_gguf: Path, out: Path, dtype: Literal["F16", "BF16", "F32"] = "F16"
) -> Path:
    """Write the weights and chat templates in the folder `checkpoint` to the GGUF file `out`; return `out`.

    A checkpoint without a template gets those of the base. Norms and biases stay F32, as llama.cpp requires. The file
    appears whole or not at all.

    Raises:
        InputError: a family we do not know, or a checkpoint that is not a fine-tuned `base_gguf`
            (another architecture, other tensors, other shapes).
        ArteError: the disk is full, or a weight does not fit `dtype`.
    """
    base, source = read_model_header(base_gguf), open_checkpoint(checkpoint)
    arch = base.architecture
    if source.family.arch != arch:
        raise InputError(f"{checkpoint}: is {source.family.arch}, but {base_gguf} is {arch}", _SAME_BASE)
    tensors = source.tensors(dtype)
    before, after = base.shapes, {tensor.name: tensor.shape for tensor in tensors}
    for name in sorted(before.keys() | after.keys()):
        # Some files hold a tied output matrix twice; the rotary factors are the checkpoint's.
        if before.get(name) != after.get(name) and not name.startswith(("rope_", "output.weight")):
            one, two = (list(shapes.get(name, ())) or "missing" for shapes in (after, before))
            raise InputError(f"{name} is {one} in {checkpoint}, {two} in {base_gguf}", _SAME_BASE)
    templates = template_fields(chat_templates(tokenizer_files(checkpoint)))
    stale = (*_STALE, *(f"{arch}.rope.scaling.{key}" for key in ("type", "factor", "attn_factor")))
    if templates:
        stale += ("tokenizer.chat_template",)
    fields = {key: field for key, field in base.fields.items() if not key.startswith(stale)}
    fields["general.file_type"] = Field(UINT32, QUANT_TYPES[dtype].number)
    return write_gguf(out, arch, fields | templates | rope.fields(source.config, arch), tensors)


def with_metadata(student: Path, fields: Mapping[str, Field], out: Path) -> Path:
    """Write a copy of the file `student`, made by `checkpoint_to_gguf`, with `fields` to `out`; return `out`."""
    name, old = fields.get("general.name"), read_model_header(student).field("general.name")
    if name is not None and old is not None:
        renamed = name_for_llama_cpp(name.value, is_phi3=is_phi3_name(old.value))
        fields = {**fields, "general.name": Field(STRING, renamed)}
    rewrite(student, fields, _PUBLICATION, out=out)
    return out


def adapter_to_gguf(adapter_dir: Path, base_gguf: Path, out: Path) -> Path:
    """Write the PEFT LoRA in the folder `adapter_dir` as a GGUF adapter for `base_gguf`; return `out`.

    The matrices stay F32. The file appears whole or not at all.

    Raises:
        InputError: no readable adapter, one that is not plain LoRA on linear layers, a family
            we do not know, or an adapter of another model than `base_gguf`.
        ArteError: the disk is full, or a value is not finite.
    """
    base = read_model_header(base_gguf)
    layout = layout_of(base)
    config, matrices = read_adapter_config(adapter_dir), read_tensors(adapter_dir / ADAPTER_WEIGHTS)
    _check_plain(adapter_dir, config)
    tensors: list[Tensor] = []
    for name in sorted(matrices):
        target, part = _target(adapter_dir, layout, name)
        _check_shape(adapter_dir, base, target, part, matrices[name].shape)
        tensors.append(_lora_tensor(layout, target, part, matrices[name]))
    # llama.cpp scales by alpha / rank, the rank being that of each pair of matrices, as PEFT does
    (alpha,) = struct.unpack("<f", struct.pack("<f", float(config["lora_alpha"])))
    fields = {
        "general.type": Field(STRING, b"adapter"),
        "adapter.type": Field(STRING, b"lora"),
        "adapter.lora.alpha": Field(FLOAT32, alpha),
    }
    return write_gguf(out, layout.arch, fields, tensors)


def _check_plain(adapter_dir: Path, config: dict[str, Any]) -> None:
    odd = [key for key in _PLAIN if config.get(key)]
    if odd:
        raise InputError(
            f"{adapter_dir / 'adapter_config.json'}: {odd[0]} = {config.get(odd[0])!r} cannot be expressed in GGUF",
            "Train plain LoRA, or merge the adapter into the weights.",
        )


def _target(adapter_dir: Path, layout: Layout, name: str) -> tuple[str, str]:
    """Return the GGUF weight that a matrix of the adapter changes, and which matrix it is, "a" or "b"."""
    for ending, part in ((".lora_A.weight", "a"), (".lora_B.weight", "b")):
        module = name.removeprefix(_PREFIX).removesuffix(ending)
        if name.endswith(ending) and (target := layout.gguf_name(f"{module}.weight")):
            return target, part
    raise InputError(
        f"{adapter_dir}: '{name}' has no place in a GGUF adapter",
        "Train LoRA on the linear layers alone, without biases or embeddings.",
    )


def _check_shape(adapter_dir: Path, base: GgufHeader, target: str, part: str, shape: tuple[int, ...]) -> None:
    weight = base.tensors.get(target)  # [n_out, n_in]; A is [rank, n_in], B is [n_out, rank]
    if weight is None or (shape[1] != weight.shape[1] if part == "a" else shape[0] != weight.shape[0]):
        raise InputError(
            f"{adapter_dir}: its matrix {part.upper()} {list(shape)} does not fit {target} of {base.path}",
            "Give the GGUF file of the model that the adapter was trained on.",
        )


def _lora_tensor(layout: Layout, target: str, part: str, matrix: Weight) -> Tensor:
    def load() -> NDArray[np.float32]:
        values: NDArray[np.float32] = widened(matrix.load())
        return layout.to_gguf(target, values) if part == "b" else values  # the layout changes rows only

    return Tensor(f"{target}.lora_{part}", matrix.shape, "F32", load)

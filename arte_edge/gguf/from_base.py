"""Write what was trained from a base GGUF as GGUF: a fine-tuned checkpoint, or a LoRA adapter.

Fine-tuning changes weights and nothing else: tokenizer, chat template and hyper-parameters are the base's. Copying them
from the base file keeps the student's prompts byte for byte those the base was measured with, and needs no converter.

llama.cpp applies an adapter to the running base model, so an aligned teacher needs no copy of its weights: the file
that generated the first data generates the tailored data, with a few megabytes beside it. The adapter is then applied
to quantized weights, not to the 16-bit ones it was trained with; a run measures the teacher as it is used.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from arte_edge.checkpoint import Weight, read_weights
from arte_edge.errors import InputError
from arte_edge.gguf.names import (
    Layout,
    checkpoint_family,
    is_phi3_name,
    layout_of,
    name_for_llama_cpp,
    tensor_position,
    weight_tensor,
)
from arte_edge.gguf.reader import FLOAT32, QUANT_TYPES, STRING, UINT32, Field, GgufHeader, read_model_header
from arte_edge.gguf.writer import Tensor, rewrite, write_gguf

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor

__all__ = ["adapter_to_gguf", "checkpoint_to_gguf", "with_metadata"]

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
    for name in base.tensors:  # rotary factors, which only the base holds
        if name.startswith("rope_"):
            tensors.append(Tensor(name, base.tensors[name].shape, "F32", partial(base.floats, name)))
    tensors.sort(key=lambda tensor: tensor_position(tensor.name))
    fields = {key: field for key, field in base.fields.items() if not key.startswith(_STALE)}
    fields["general.file_type"] = Field(UINT32, QUANT_TYPES[dtype].number)
    return write_gguf(out, layout.arch, fields, tensors)


def with_metadata(student: Path, fields: Mapping[str, Field], out: Path) -> Path:
    """Write a copy of the file `student`, made by `checkpoint_to_gguf`, with `fields` to `out`; return `out`."""
    name, old = fields.get("general.name"), read_model_header(student).field("general.name")
    if name is not None and old is not None:
        renamed = name_for_llama_cpp(name.value, is_phi3=is_phi3_name(old.value))
        fields = {**fields, "general.name": Field(STRING, renamed)}
    rewrite(student, fields, _PUBLICATION, out=out)
    return out


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
        shapes = f"{list(weight.shape)}, in {base.path} {list(expected)}"
        raise InputError(f"{weight.path}: {weight.name} is {shapes}", _SAME_BASE)
    return weight_tensor(layout, name, weight, dtype)


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
    config, matrices = _read_adapter(adapter_dir)
    _check_plain(adapter_dir, config)
    tensors: list[Tensor] = []
    for name in sorted(matrices):
        target, part = _target(adapter_dir, layout, name)
        _check_shape(adapter_dir, base, target, part, tuple(matrices[name].shape))
        tensors.append(_lora_tensor(layout, target, part, matrices[name]))
    # llama.cpp scales by alpha / rank, the rank being that of each pair of matrices, as PEFT does
    (alpha,) = struct.unpack("<f", struct.pack("<f", float(config["lora_alpha"])))
    fields = {
        "general.type": Field(STRING, b"adapter"),
        "adapter.type": Field(STRING, b"lora"),
        "adapter.lora.alpha": Field(FLOAT32, alpha),
    }
    return write_gguf(out, layout.arch, fields, tensors)


def _read_adapter(adapter_dir: Path) -> tuple[dict[str, Any], dict[str, TorchTensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config: dict[str, Any] = json.loads((adapter_dir / "adapter_config.json").read_text("utf-8"))
        matrices: dict[str, TorchTensor] = load_file(adapter_dir / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        what = f"{adapter_dir}: no readable adapter_config.json and adapter_model.safetensors"
        raise InputError(what, "Give the folder of a LoRA adapter as PEFT saves it.") from error
    return config, matrices


def _check_plain(adapter_dir: Path, config: dict[str, Any]) -> None:
    odd = [key for key in _PLAIN if config.get(key)]
    if config.get("peft_type") != "LORA":
        odd.insert(0, "peft_type")
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


def _lora_tensor(layout: Layout, target: str, part: str, matrix: TorchTensor) -> Tensor:
    def load() -> NDArray[np.float32]:
        values: NDArray[np.float32] = matrix.float().numpy()
        return layout.to_gguf(target, values) if part == "b" else values  # the layout changes rows only

    return Tensor(f"{target}.lora_{part}", tuple(matrix.shape), "F32", load)

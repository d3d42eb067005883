"""How a family's tensors lie in a GGUF file, against how they lie in a transformers checkpoint.

Three things differ. Names (`gguf` carries the table). The rows of a Llama's query
and key projections: transformers pairs the two halves of a head in its rotary
embedding, llama.cpp pairs neighbours, so the rows are interleaved. And Gemma's
norms: transformers multiplies by ``1 + weight``, llama.cpp by ``weight``. Which
family needs what stands in its file, see `families`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import InputError
from arte_edge.models.families import Family, family_of_arch, family_of_model_type
from arte_edge.models.gguf_fields import GgufFields
from arte_edge.models.gguf_write import Tensor, widened
from arte_edge.models.weights import Weight

if TYPE_CHECKING:
    from gguf import TensorNameMap

__all__ = ["Layout", "checkpoint_family", "is_kept_f32", "layout_of", "read_config", "weight_tensor"]


@dataclass(frozen=True)
class Layout:
    """The GGUF names and layout of one model: its family and its head counts."""

    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int

    @cached_property
    def family(self) -> Family:
        """The family that `arch` names."""
        return family_of_arch(self.arch, "GGUF")

    @cached_property
    def _names(self) -> TensorNameMap:
        import gguf

        archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        return gguf.get_tensor_name_map(archs[self.arch], self.n_layer)

    def gguf_name(self, name: str) -> str | None:
        """Return the GGUF name of a checkpoint's tensor, or None for one that llama.cpp does not know."""
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    def moves(self, gguf_name: str) -> bool:
        """True if `to_gguf` changes the tensor of this name."""
        part = gguf_name.split(".")[-2]
        offset = self.family.norm_offset and part.endswith("norm")
        return bool(offset) or (self.family.interleave_heads and part in ("attn_q", "attn_k"))

    def to_gguf(self, gguf_name: str, tensor: NDArray[Any]) -> NDArray[Any]:
        """Return `tensor` (``[n_out, ...]``: weight, bias or LoRA's B matrix) as llama.cpp lays it out.

        Rows are moved whatever their type is, also as raw bits; a norm must be float32.
        """
        if not self.moves(gguf_name):
            return tensor
        part = gguf_name.split(".")[-2]
        if part.endswith("norm"):
            return tensor + np.float32(self.family.norm_offset)
        heads = self.n_head if part == "attn_q" else self.n_head_kv
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)


def is_kept_f32(gguf_name: str, shape: tuple[int, ...]) -> bool:
    """True for what llama.cpp wants in float32 in every file: norms, biases and rotary factors."""
    return len(shape) == 1 or gguf_name.endswith("_norm.weight")


def weight_tensor(layout: Layout, name: str, weight: Weight, dtype: str) -> Tensor:
    """Return a checkpoint's weight as the GGUF tensor `name`, read and laid out when it is written."""
    kept = is_kept_f32(name, weight.shape)

    def moved() -> NDArray[np.generic]:
        values = weight.load()
        return layout.to_gguf(name, widened(values) if kept else values)

    load = moved if layout.moves(name) else weight.blocks
    return Tensor(name, weight.shape, "F32" if kept else dtype, load)


def layout_of(base: GgufFields) -> Layout:
    """Return the layout of the model in a GGUF file.

    Raises:
        InputError: its architecture is not one of `families`.
    """
    family_of_arch(base.architecture, str(base.path))
    n_head = base.number("attention.head_count")
    shared = f"{base.architecture}.attention.head_count_kv" in base.fields
    n_head_kv = base.number("attention.head_count_kv") if shared else n_head
    return Layout(base.architecture, base.number("block_count"), n_head, n_head_kv)


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Return the config.json of the transformers checkpoint in a folder.

    Raises:
        InputError: it is missing or no JSON object.
    """
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint}: no readable config.json", "Give a transformers checkpoint."
        ) from error
    return config


def checkpoint_family(checkpoint: Path) -> str:
    """Return the GGUF architecture of the transformers checkpoint in a folder.

    Raises:
        InputError: no readable config.json, or a model type that is not one of `families`.
    """
    config = read_config(checkpoint)
    return family_of_model_type(config.get("model_type"), str(checkpoint / "config.json")).arch

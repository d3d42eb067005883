"""How a family's tensors lie in a GGUF file, against how they lie in a transformers checkpoint.

Three things differ. Names (`gguf` carries the table). The rows of a Llama's query
and key projections: transformers pairs the two halves of a head in its rotary
embedding, llama.cpp pairs neighbours, so the rows are interleaved. And Gemma's
norms: transformers multiplies by ``1 + weight``, llama.cpp by ``weight``.
Only families whose agreement a test shows are listed.
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
from arte_edge.models.gguf_fields import GgufFields

if TYPE_CHECKING:
    from gguf import TensorNameMap

__all__ = ["FAMILIES", "Family", "Layout", "checkpoint_family", "layout_of"]


@dataclass(frozen=True)
class Family:
    """What is special about one architecture."""

    model_type: str  # of the checkpoint's config.json
    interleave_heads: bool = False
    norm_offset: float = 0.0


# GGUF architecture -> family
FAMILIES = {
    "llama": Family("llama", interleave_heads=True),
    "qwen2": Family("qwen2"),
    "gemma3": Family("gemma3_text", norm_offset=1.0),
}


@dataclass(frozen=True)
class Layout:
    """The GGUF names and layout of one model: its family and its head counts."""

    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int

    @cached_property
    def _names(self) -> TensorNameMap:
        import gguf

        archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        return gguf.get_tensor_name_map(archs[self.arch], self.n_layer)

    def gguf_name(self, name: str) -> str | None:
        """Return the GGUF name of a checkpoint's tensor, or None for one that llama.cpp does not know."""
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    def to_gguf(self, gguf_name: str, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `tensor` (``[n_out, ...]``: weight, bias or LoRA's B matrix) as llama.cpp lays it out."""
        family = FAMILIES[self.arch]
        part = gguf_name.split(".")[-2]
        if family.interleave_heads and part in ("attn_q", "attn_k"):
            heads = self.n_head if part == "attn_q" else self.n_head_kv
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        return tensor + np.float32(family.norm_offset) if part.endswith("norm") else tensor


def layout_of(base: GgufFields) -> Layout:
    """Return the layout of the model in a GGUF file.

    Raises:
        InputError: its architecture is not one of `FAMILIES`.
    """
    if base.architecture not in FAMILIES:
        raise _unsupported(f"{base.path}: architecture '{base.architecture}'")
    n_head = base.number("attention.head_count")
    shared = f"{base.architecture}.attention.head_count_kv" in base.fields
    n_head_kv = base.number("attention.head_count_kv") if shared else n_head
    return Layout(base.architecture, base.number("block_count"), n_head, n_head_kv)


def checkpoint_family(checkpoint: Path) -> str:
    """Return the GGUF architecture of the transformers checkpoint in a folder.

    Raises:
        InputError: no readable config.json, or a model type that is not one of `FAMILIES`.
    """
    try:
        config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint}: no readable config.json", "Give a transformers checkpoint."
        ) from error
    for arch, family in FAMILIES.items():
        if config.get("model_type") == family.model_type:
            return arch
    raise _unsupported(f"{checkpoint / 'config.json'}: model_type '{config.get('model_type')}'")


def _unsupported(what: str) -> InputError:
    known = ", ".join(f"{arch} ({family.model_type})" for arch, family in FAMILIES.items())
    return InputError(f"{what} is not supported", f"Supported: {known}.")

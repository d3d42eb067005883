"""The model families that a GGUF file can be written for, and how their tensors are named and laid out.

Each family is a small TOML file in ``families/``: the model types of its checkpoints, how rows are laid out, which GGUF
keys its hyper-parameters go to, and what llama.cpp assumes about it (a checkpoint that differs there is rejected,
because its file would load and answer wrongly). docs/new-family.md explains how to add one.

A GGUF file differs from a transformers checkpoint in three ways. Names (`gguf` has the table). The rows of a
Llama's query and key projections: transformers pairs the two halves of a head in its rotary embedding,
llama.cpp pairs neighbours, so the rows are interleaved. And Gemma's norms: transformers multiplies by
``1 + weight``, llama.cpp by ``weight``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from arte_edge.checkpoint import Weight, read_config
from arte_edge.errors import InputError
from arte_edge.files import read_toml, validated
from arte_edge.gguf.reader import GgufHeader
from arte_edge.gguf.writer import Tensor, widened

if TYPE_CHECKING:
    from gguf import TensorNameMap

OTHER_CONVERTER = "For other models give your own checkout of llama.cpp with --llama-cpp DIR."
BLOCK = re.compile(r"blk\.(\d+)\.(.+)")  # a tensor of a layer: its number, its name inside
_PHI3 = re.compile(rb"phi-?3", re.IGNORECASE)
_FOLDER = Path(__file__).with_name("families")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pattern(_Frozen):
    """What each layer's entry of a list in config.json must be: `value` at every `every`-th, `others` else."""

    every: int = Field(gt=0)
    value: Any
    others: Any

    def expected(self, n_layer: int) -> list[Any]:
        """Return the list assumed by llama.cpp."""
        return [self.value if (layer + 1) % self.every == 0 else self.others for layer in range(n_layer)]


class Family(_Frozen):
    """What is special about one architecture. Field names are the keys of its TOML file.

    `uint32` and `float32` map a GGUF key, without ``<arch>.``, to the key of config.json that
    its value comes from; a name that ends in ``?`` may be missing.
    """

    arch: str  # general.architecture, and the name of the table in GGML's `gguf`
    model_types: tuple[str, ...] = Field(min_length=1)  # config.json: model_type
    title: str
    interleave_heads: bool = False
    norm_offset: float = 0.0
    rope_types: tuple[str, ...] = ("default",)
    pre_tokenizers: dict[str, str] = {}  # our name of a splitting rule -> the family's own name for it
    add_space_prefix: bool | None = None
    uint32: dict[str, str]
    float32: dict[str, str]
    defaults: dict[str, Any] = {}  # transformers' values where config.json has none
    must: dict[str, tuple[Any, ...]] = {}  # config key -> the only values llama.cpp implements
    same: dict[str, tuple[str, ...]] = {}  # config key -> keys, one of which must have the same value
    patterns: dict[str, Pattern] = {}


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """Return the families by GGUF architecture, sorted.

    Raises InputError: a file is not valid TOML or breaks the schema; says which file and key.
    """
    found: dict[str, Family] = {}
    for path in sorted(_FOLDER.glob("*.toml")):
        family = validated(Family, read_toml(path), str(path), "See docs/new-family.md.")
        found[family.arch] = family
    return found


def family_of_arch(arch: str, where: str) -> Family:
    """Return the family of a GGUF architecture or raise an `InputError` whose message begins with `where`."""
    if arch not in families():
        raise _unsupported(f"{where}: architecture '{arch}'")
    return families()[arch]


def family_of_model_type(model_type: object, where: str) -> Family:
    """Return the family of a checkpoint's ``model_type`` or raise an `InputError` that begins with `where`."""
    for family in families().values():
        if model_type in family.model_types:
            return family
    raise _unsupported(f"{where}: model_type '{model_type}'")


def _unsupported(what: str) -> InputError:
    known = ", ".join(f"{arch} ({' '.join(family.model_types)})" for arch, family in families().items())
    return InputError(f"{what} is not supported", f"Supported: {known}.")


@dataclass(frozen=True)
class Layout:
    """The GGUF names and layout of one model: its family and its head counts."""

    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int

    @cached_property
    def family(self) -> Family:
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


def tensor_position(gguf_name: str) -> tuple[int, int, str]:
    """Return the sort key of a tensor in the files we write: rotary factors, embedding, blocks in order, output.

    One order for every writer: the tensor hash, which results are keyed on, depends on it.
    """
    if match := BLOCK.fullmatch(gguf_name):
        return 2, int(match[1]), match[2]
    rank = 0 if gguf_name.startswith("rope_") else 1 if gguf_name.startswith("token_embd") else 3
    return rank, 0, gguf_name


def is_phi3_name(name: bytes) -> bool:
    """True if llama.cpp treats the tokens of a file with this ``general.name`` as Phi-3's."""
    return _PHI3.search(name) is not None


def name_for_llama_cpp(name: bytes, is_phi3: bool) -> bytes:
    """Return `name` with "Phi-3" in it if, and only if, llama.cpp must treat the tokens as Phi-3's.

    The name alone makes it drop spaces after special tokens, and then it rejects a vocabulary that lacks one of
    four (llama-vocab.cpp, "phi-3").
    """
    if is_phi3:
        return name if is_phi3_name(name) else name + b" (Phi-3)"
    return _PHI3.sub(b"Phi 3", name)


def weight_tensor(layout: Layout, name: str, weight: Weight, dtype: str) -> Tensor:
    """Return a checkpoint's weight as the GGUF tensor `name`, read and laid out when it is written.

    llama.cpp requires norms, biases and rotary factors as float32 in every file.
    """
    is_f32 = len(weight.shape) == 1 or name.endswith("_norm.weight")

    def moved() -> NDArray[np.generic]:
        values = weight.load()
        return layout.to_gguf(name, widened(values) if is_f32 else values)

    load = moved if layout.moves(name) else weight.blocks
    return Tensor(name, weight.shape, "F32" if is_f32 else dtype, load)


def layout_of(base: GgufHeader) -> Layout:
    """Return the layout of the model in a GGUF file; an `InputError` if its architecture is not supported."""
    family_of_arch(base.architecture, str(base.path))
    n_head = base.number("attention.head_count")
    shared = base.field(f"{base.architecture}.attention.head_count_kv") is not None
    n_head_kv = base.number("attention.head_count_kv") if shared else n_head
    n_layer = base.number("block_count")
    if min(n_head, n_head_kv) < 1 or not 0 <= n_layer <= len(base.tensors):
        what = f"{n_layer} layers of {n_head} and {n_head_kv} heads in {len(base.tensors)} tensors"
        raise InputError(f"{base.path}: {what}", "Fetch or convert the file again.")
    return Layout(base.architecture, n_layer, n_head, n_head_kv)


def checkpoint_family(checkpoint: Path) -> str:
    """Return the GGUF architecture of the transformers checkpoint in a folder; an `InputError` if not supported."""
    model_type = read_config(checkpoint).get("model_type")
    return family_of_model_type(model_type, str(checkpoint / "config.json")).arch

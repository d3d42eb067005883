"""What an export would make, before anything is made: the files, their sizes and the memory it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from arte_edge.cache import megabytes
from arte_edge.checkpoint import shapes_of
from arte_edge.console import emit_json, out
from arte_edge.export.build import needs_imatrix, uses_base
from arte_edge.export.formats import Format
from arte_edge.export.recipe import Recipe
from arte_edge.export.source import Source
from arte_edge.gguf.types import TENSOR_TYPES, find_type, quality_warning

__all__ = ["Line", "Plan", "plan", "predicted_bytes", "show_plan"]

_BITS = {label: 8 * size / block for label, block, size in TENSOR_TYPES.values()}
_BLOCKS = {label: block for label, block, _ in TENSOR_TYPES.values()}
# What llama.cpp takes where a row is not whole blocks of 256 (llama-quant.cpp, tensor_type_fallback).
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_SMALL_BLOCKS = "IQ4_NL"
# Mixes whose name says "medium" and more: half of these matrices get more bits.
_MORE = {"Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "Q4_K_M": "Q6_K", "Q5_K_M": "Q6_K"}
_MORE_PARTS = ("v_proj", "down_proj", "qkv_proj")
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
_HEAD_BYTES_PER_TOKEN = 38  # vocabulary and merges of a GGUF: 1.8 MB for SmolLM2's 49,152 tokens
_FOLDER_BYTES = 4_000_000  # tokenizer files of an ONNX folder
_GIGABYTE = 1_000_000_000


@dataclass(frozen=True)
class Line:
    """The predicted size of one format's file or folder."""

    format: Format
    size_bytes: int
    bits_per_weight: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The predicted disk space and memory of an export."""

    lines: tuple[Line, ...]
    base_bytes: int  # the 16-bit GGUF that is removed at the end, 0 if none is made or it is kept
    memory_bytes: int
    memory_step: str
    imatrix: bool

    @property
    def disk_bytes(self) -> int:
        """The most that lies on the disk at once."""
        return self.base_bytes + sum(line.size_bytes for line in self.lines)


def plan(
    shapes: Mapping[str, tuple[int, ...]],
    formats: Sequence[Format],
    recipe: Recipe,
    *,
    n_training: int,
) -> Plan:
    """Return the plan for a checkpoint with tensors of these `shapes` and a number of training texts."""
    n_parameter = sum(math.prod(shape) for shape in shapes.values())
    imatrix = recipe.gguf.imatrix and n_training > 0 and any(map(needs_imatrix, formats))
    base = Format("gguf", recipe.gguf.base)
    converts = any(uses_base(format, base.type) for format in formats)
    step, memory = max(_memory(formats, shapes, n_parameter, imatrix).items(), key=lambda item: item[1])
    return Plan(
        lines=tuple(_line(format, shapes, n_parameter) for format in formats),
        base_bytes=predicted_bytes(base, shapes) if converts and base not in formats else 0,
        memory_bytes=memory,
        memory_step=step,
        imatrix=imatrix,
    )


def _line(format: Format, shapes: Mapping[str, tuple[int, ...]], n_parameter: int) -> Line:
    size = predicted_bytes(format, shapes)
    note = quality_warning(find_type(format.type), n_parameter) if format.family == "gguf" else None
    bits = 8 * (size - _overhead(format, shapes)) / n_parameter
    return Line(format, size, bits, (note,) if note else ())


def predicted_bytes(format: Format, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return about how many bytes the file or folder of `format` will have."""
    is_tied = not any(name.endswith("lm_head.weight") for name in shapes)
    bits = 0.0
    for name, shape in shapes.items():
        n_value = math.prod(shape)
        if format.family == "gguf":
            bits += n_value * _gguf_bits(format.type, name, shape, is_tied)
        else:
            bits += n_value * _onnx_bits(format, name, shape, is_tied)
            if is_tied and name.endswith("embed_tokens.weight") and _unties(format):
                bits += n_value * _onnx_bits(format, "lm_head.weight", shape, False)
    return round(bits / 8) + _overhead(format, shapes)


def _overhead(format: Format, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the bytes of a file or folder that are not weights."""
    n_vocab = max((shape[0] for name, shape in shapes.items() if name.endswith(_EMBEDDINGS)), default=0)
    return _FOLDER_BYTES if format.is_folder else _HEAD_BYTES_PER_TOKEN * n_vocab


def _gguf_bits(type: str, name: str, shape: tuple[int, ...], is_tied: bool) -> float:
    quant = find_type(type)
    if len(shape) < 2:
        return 32.0
    label = quant.default
    if quant.is_quantized and label != "Q8_0":
        if name.endswith("lm_head.weight") or (is_tied and name.endswith("embed_tokens.weight")):
            label = "Q6_K"
        elif type in _MORE and any(part in name for part in _MORE_PARTS):
            # Half of the layers; an average is all that a sum of sizes needs.
            return (_fitting(_MORE[type], shape) + _fitting(label, shape)) / 2
    return _fitting(label, shape)


def _fitting(label: str, shape: tuple[int, ...]) -> float:
    """Return the bits a weight of a tensor type, or of the one that is taken where its blocks do not fit."""
    if shape[-1] % _BLOCKS.get(label, 1):
        label = _FALLBACK.get(label, _SMALL_BLOCKS)
    return _BITS.get(label, 16.0)


def _unties(format: Format) -> bool:
    """True if the builder stores a tied embedding a second time, as the output matrix."""
    return format.family == "onnx-optimum" or format.type == "int8"


def _onnx_bits(format: Format, name: str, shape: tuple[int, ...], is_tied: bool) -> float:
    if format.type == "fp32" or len(shape) < 2:
        return 32.0
    if format.family == "onnx-optimum":
        return 32.0 if name.endswith("down_proj.weight") else 8.0  # int8 would spoil that product
    if name.endswith("embed_tokens.weight") and not (is_tied and format.type == "int4"):
        return 32.0  # only products of matrices are quantized; int4 looks tokens up in the product's matrix
    if format.type == "int4" and not name.endswith(_EMBEDDINGS):
        return 6.1  # measured: 28 % of the layers' weights get 8 bits
    return 9.0  # a float32 scale for 32 weights


def _memory(
    formats: Sequence[Format], shapes: Mapping[str, tuple[int, ...]], n_parameter: int, imatrix: bool
) -> dict[str, int]:
    """Return the rough peak of each step in bytes."""
    largest = max(math.prod(shape) for shape in shapes.values())
    verify = 4 * n_parameter + max(predicted_bytes(format, shapes) for format in formats) + _GIGABYTE
    steps = {"verifying": verify}
    if any(format.family == "gguf" for format in formats):
        steps["quantizing"] = 6 * largest + 700_000_000
    if imatrix:
        steps["importance matrix"] = 4 * n_parameter + _GIGABYTE
    if any(format.family == "onnx-genai" for format in formats):
        steps["building ONNX"] = 6 * n_parameter + _GIGABYTE
    if any(format.family == "onnx-optimum" for format in formats):
        steps["building ONNX"] = 15 * n_parameter + _GIGABYTE
    return steps


def show_plan(
    source: Source, formats: tuple[Format, ...], recipe: Recipe, folder: Path, as_json: bool
) -> None:
    """Print the plan of exporting `source` to `folder`.

    Raises:
        InputError: its weights cannot be read.
    """
    found = plan(shapes_of(source.checkpoint), formats, recipe, n_training=len(source.training))
    if as_json:
        emit_json(_document(found, source, folder))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("file", overflow="fold")
    for name in ("size", "bits/w"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in found.lines:
        name = line.format.file_name(source.name)
        table.add_row(name, megabytes(line.size_bytes), f"{line.bits_per_weight:.1f}")
    if found.base_bytes:
        table.add_row("16-bit GGUF, removed at the end", megabytes(found.base_bytes), "")
    table.add_section()
    table.add_row("at most", megabytes(found.disk_bytes), "", style="bold")
    out.print(table)
    for note in _notes(found, source, folder):
        out.print(note, markup=False, soft_wrap=True)


def _notes(found: Plan, source: Source, folder: Path) -> list[str]:
    matrix = (
        f"Importance matrix from {len(source.training)} {source.training_from}."
        if found.imatrix
        else "No importance matrix: none of these types uses one, or there are no training texts (--task)."
    )
    return [
        f"Into {folder}. Memory: about {megabytes(found.memory_bytes)}, while {found.memory_step} (rough).",
        matrix,
        f"Verified on {len(source.prompts)} prompts: {source.prompts_from}.",
        *source.notes,
        *(note for line in found.lines for note in line.notes),
    ]


def _document(found: Plan, source: Source, folder: Path) -> dict[str, Any]:
    lines = [
        {
            "file": line.format.file_name(source.name),
            "format": line.format.family,
            "quantization": line.format.type,
            "size_bytes": line.size_bytes,
            "bits_per_weight": round(line.bits_per_weight, 2),
            "notes": list(line.notes),
        }
        for line in found.lines
    ]
    return {
        "event": "plan",
        "folder": str(folder),
        "artifacts": lines,
        "base_bytes": found.base_bytes,
        "disk_bytes": found.disk_bytes,
        "memory_bytes_rough": found.memory_bytes,
        "memory_step": found.memory_step,
        "imatrix": found.imatrix,
        "notes": _notes(found, source, folder),
    }

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
from arte_edge.export.recipe import Recipe
from arte_edge.export.source import Source
from arte_edge.gguf.types import find_type, quality_warning
from arte_edge.models.formats import Format, overhead_bytes, predicted_bytes

__all__ = ["Line", "Plan", "plan", "show_plan"]

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
    bits = 8 * (size - overhead_bytes(format, shapes)) / n_parameter
    return Line(format, size, bits, (note,) if note else ())


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

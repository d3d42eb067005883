"""``arte-edge export --dry-run``: predicted sizes and memory on stdout; nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from arte_edge.cache import megabytes
from arte_edge.console import emit_json, out
from arte_edge.export.formats import Format
from arte_edge.export.plan import Plan, plan
from arte_edge.export.recipe import Recipe
from arte_edge.export.source import Source
from arte_edge.export.weights import shapes_of

__all__ = ["show_plan"]


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

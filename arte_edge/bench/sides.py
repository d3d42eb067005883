"""Results from wherever a user keeps them: a bench.jsonl, what ``bench -o json`` printed, an export, a run, a model."""

from __future__ import annotations

import json
from pathlib import Path

from arte_edge.errors import InputError
from arte_edge.results.rows import BENCH_NAME, Row, parse_row, read_rows

__all__ = ["rows_of"]

_MEASURE = "Measure it first: arte-edge bench {path}"


def rows_of(path: Path) -> list[Row]:
    """Return the rows that `path` stands for, never none.

    Args:
        path: a .jsonl file of rows, a .json list of them, a folder with bench.jsonl in it or in
            its export folder, or one measured model, whose bench.jsonl lies beside it.

    Raises:
        InputError: nothing there, no results, or a damaged file.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix in (".jsonl", ".json"):
        rows = read_rows(path) if path.suffix == ".jsonl" else _json_rows(path)
        if not rows:
            raise InputError(f"{path}: holds no results", _MEASURE.format(path="MODEL"))
        return rows
    if path.is_dir():
        for place in (path, path / "export"):
            if rows := read_rows(place / BENCH_NAME):
                return rows
    beside = path.resolve()
    rows = [row for row in read_rows(beside.parent / BENCH_NAME) if row.model_filename == beside.name]
    if not rows:
        raise InputError(f"{path}: no results in {BENCH_NAME} here or beside it", _MEASURE.format(path=path))
    return rows


def _json_rows(path: Path) -> list[Row]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON", "Give what `bench -o json` printed.") from error
    if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
        raise InputError(f"{path}: not a list of results", "Give what `bench -o json` printed.")
    again = "Measure it again."
    return [parse_row(row, f"{path}: row {number}", again) for number, row in enumerate(document, 1)]

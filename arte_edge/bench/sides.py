"""Results from wherever a user keeps them: a bench.jsonl, what ``bench -o json`` printed, an export, a run, a model."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from arte_edge.bench.result import QualityRow, SpeedRow
from arte_edge.bench.rows import FILE_NAME, read_rows
from arte_edge.errors import InputError

__all__ = ["rows_of"]

_MEASURE = "Measure it first: arte-edge bench {path}"


def rows_of(path: Path) -> list[SpeedRow | QualityRow]:
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
            if rows := read_rows(place / FILE_NAME):
                return rows
    beside = path.resolve()
    rows = [row for row in read_rows(beside.parent / FILE_NAME) if row.model_filename == beside.name]
    if not rows:
        raise InputError(f"{path}: no results in {FILE_NAME} here or beside it", _MEASURE.format(path=path))
    return rows


def _json_rows(path: Path) -> list[SpeedRow | QualityRow]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON", "Give what `bench -o json` printed.") from error
    if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
        raise InputError(f"{path}: not a list of results", "Give what `bench -o json` printed.")
    rows: list[SpeedRow | QualityRow] = []
    for number, row in enumerate(document, 1):
        kind = SpeedRow if "test" in row else QualityRow
        try:
            rows.append(kind.model_validate_json(json.dumps(row)))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{path}: row {number}: {key}: {first['msg']}", "Measure it again.") from error
    return rows

"""Loads labelled tables with columns of any name: a JSONL file, or a dataset of the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from arte_edge.errors import ArteError, InputError, nearest
from arte_edge.extras import need
from arte_edge.tasks.problems import refuse
from arte_edge.tasks.rows import parse_jsonl
from arte_edge.tasks.table import Record

__all__ = ["hub_records", "jsonl_records", "task_name"]

# What `Dataset.save_to_disk` leaves behind, as opposed to a folder of data files.
_SAVED_DATASET = ("dataset_dict.json", "state.json")


def task_name(ref: str) -> str:
    """Return a task name made of the last part of `ref`: ``data/My Set.jsonl`` gives ``my_set``."""
    last = ref.rstrip("/").rsplit("/", 1)[-1].removesuffix(".jsonl")
    return re.sub(r"[^a-z0-9]+", "_", last.lower()).strip("_") or "task"


def jsonl_records(path: Path, input_column: str = "input", target_column: str = "target") -> list[Record]:
    """Read `path`, one JSON object a line.

    Raises:
        InputError: no such file, a line that is not JSON, or a column that is not there.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file", "A JSON object a line, with an input and a target column.")
    values, problems = parse_jsonl(path)
    refuse(problems, str(path))
    return list(_records(values, input_column, target_column))


def hub_records(
    name: str,
    input_column: str = "input",
    target_column: str = "target",
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
) -> list[Record]:
    """Read a split of the Hub dataset `name`, or of a dataset in a local folder.

    Raises:
        InputError: no such dataset, configuration, split or column.
        ArteError: the `datasets` library is missing, or the Hub cannot be reached.
    """
    if find_spec("datasets") is None:
        need("train", "Loading a dataset of the Hub")
    import datasets

    try:
        if any((Path(name) / marker).is_file() for marker in _SAVED_DATASET):
            data: Any = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, dict) else data
        else:
            data = datasets.load_dataset(name, config, split=split, revision=revision)
    except (FileNotFoundError, ValueError, KeyError) as error:
        known = f"hub:{name}: the dataset, its configuration or its split '{split}' is not there"
        raise InputError(
            f"{known} ({_first_line(error)})", "Options: hub:org/name?config=…&split=…."
        ) from error
    except OSError as error:
        raise ArteError(
            f"hub:{name} cannot be reached ({_first_line(error)})", "Try again when online."
        ) from error
    names = {key: f.int2str for key, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
    values = ((f"hub:{name}[{split}]:{index}", row) for index, row in enumerate(data))
    return list(_records(values, input_column, target_column, names))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]


def _records(
    values: Iterable[tuple[str, Mapping[str, Any]]],
    input_column: str,
    target_column: str,
    label_names: Mapping[str, Any] | None = None,
) -> Iterable[Record]:
    """Yield the two columns of each row as text; class labels that are numbers get their names."""
    names = label_names or {}
    for where, row in values:
        cells = []
        for column in (input_column, target_column):
            if column not in row:
                hint = f"{nearest(column, row)} Name the columns: --input and --target, or ?input=…&target=…."
                raise InputError(f"{where}: no column '{column}'", hint)
            cell = names[column](row[column]) if column in names else row[column]
            if not isinstance(cell, str | int | float) or not str(cell).strip():
                raise InputError(f"{where}: column '{column}' holds {cell!r}, not a text or a number")
            cells.append(str(cell))
        yield Record(where, cells[0], cells[1])

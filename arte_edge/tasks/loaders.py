"""Load a task from any kind of reference.

=========================  ==================================================
reference                  meaning
=========================  ==================================================
``home_intents``           a shipped task
``./my_task``              a task folder
``data.jsonl?input=q``     a labelled file, split here
``hub:org/name?split=…``   a dataset of the Hub, or ``hub:./folder``
``bbh/navigate.json``      a task in the layout of BIG-Bench Hard
``navigate``, with `bbh`   the same, from the folder `bbh`
=========================  ==================================================

Options follow a question mark, as in a URL. Tables without splits have ``seed`` (of the split, 0) and ``rows``
(maximum); labelled files and Hub datasets ``input`` and ``target`` (column names); Hub datasets ``config``,
``split`` and ``revision``.

BIG-Bench Hard's files have no splits and no description: the split is seeded, and description and technique
prompts come from ``prose/bbh.toml``, in the four groups of the ARTE paper: logic, commonsense, mathematics,
knowledge.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import parse_qsl

from arte_edge import catalog
from arte_edge.errors import ArteError, InputError, nearest
from arte_edge.extras import need
from arte_edge.files import json_loads, user_path
from arte_edge.tasks.folder import load_folder, parse_jsonl
from arte_edge.tasks.from_table import Record, prose, task_from_table
from arte_edge.tasks.task import FewShotExample, Task
from arte_edge.tasks.validation import raise_first

__all__ = ["bbh_names", "find_folder", "hub_records", "jsonl_records", "load_bbh", "load_task", "task_name"]

# Written by `Dataset.save_to_disk`; not in a folder of data files.
_SAVED_DATASET = ("dataset_dict.json", "state.json")


def task_name(ref: str) -> str:
    """Return a task name from the last part of `ref`: ``data/My Set.jsonl`` gives ``my_set``."""
    last = ref.rstrip("/").rsplit("/", 1)[-1].removesuffix(".jsonl")
    return re.sub(r"[^a-z0-9]+", "_", last.lower()).strip("_") or "task"


def jsonl_records(path: Path, input_column: str = "input", target_column: str = "target") -> list[Record]:
    """Read `path`, one JSON object a line.

    Raises:
        InputError: no such file, a line that is not JSON, or a missing column.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file", "One JSON object a line, with an input and a target column."
        )
    values, problems = parse_jsonl(path)
    raise_first(problems, str(path))
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
        need("train", "Loading a Hub dataset")
    import datasets

    try:
        if any((Path(name) / marker).is_file() for marker in _SAVED_DATASET):
            data: Any = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, dict) else data
        else:
            data = datasets.load_dataset(name, config, split=split, revision=revision)
    except (FileNotFoundError, ValueError, KeyError) as error:
        known = f"hub:{name}: the dataset, its configuration or its split '{split}' does not exist"
        raise InputError(
            f"{known} ({_first_line(error)})", "Options: hub:org/name?config=…&split=…."
        ) from error
    except OSError as error:
        raise ArteError(
            f"hub:{name} cannot be reached ({_first_line(error)})", "Try again with network access."
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
    """Yield the two columns of each row as text, class labels by name."""
    names = label_names or {}
    for where, row in values:
        cells = []
        for column in (input_column, target_column):
            if column not in row:
                hint = f"{nearest(column, row)} Name the columns: --input and --target, or ?input=…&target=…."
                raise InputError(f"{where}: no column '{column}'", hint)
            cell = names[column](row[column]) if column in names else row[column]
            if not isinstance(cell, str | int | float) or not str(cell).strip():
                raise InputError(f"{where}: column '{column}' is {cell!r}, not a text or a number")
            cells.append(str(cell))
        yield Record(where, cells[0], cells[1])


def bbh_names(folder: Path) -> list[str]:
    """Return the names of the tasks in `folder`, sorted.

    Raises:
        InputError: no such folder, or no JSON file in it.
    """
    names = sorted(path.stem for path in folder.glob("*.json"))
    if not names:
        what = "has no JSON files" if folder.is_dir() else "is not a folder"
        raise InputError(f"{folder} {what}", "--bbh takes a folder of BIG-Bench Hard's <task>.json files.")
    return names


def load_bbh(folder: Path, name: str, *, split_seed: int = 0, max_rows: int | None = None) -> Task:
    """Load the task `name` from `folder`, split by `split_seed`.

    Raises:
        InputError: no such folder or task, or a file in another layout.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise InputError(f"No task '{name}' in {folder}", nearest(name, bbh_names(folder)))
    about = prose("bbh")
    ours = about["tasks"].get(name)
    extra: dict[str, object] = ours if isinstance(ours, dict) else {}
    worked = extra.get("worked")
    group = about["techniques"].get(str(extra.get("group")), [])
    return task_from_table(
        name,
        _read(path),
        split_seed=split_seed,
        max_rows=max_rows,
        description=str(extra.get("description", "")),
        techniques=tuple(str(item) for item in group) if isinstance(group, list) else (),
        worked=tuple(FewShotExample.model_validate(item) for item in worked)
        if isinstance(worked, list)
        else (),
    )


def _read(path: Path) -> list[Record]:
    hint = 'The layout is {"examples": [{"input": "...", "target": "..."}, ...]}.'
    try:
        rows = json_loads(path.read_text(encoding="utf-8"))["examples"]
        return [
            Record(f"{path.name}:examples[{index}]", str(row["input"]), str(row["target"]))
            for index, row in enumerate(rows)
        ]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not in the layout of BIG-Bench Hard ({error!r})", hint) from error


_SPLIT_OPTIONS = ("seed", "rows")
_COLUMNS = (*_SPLIT_OPTIONS, "input", "target")
_HUB = (*_COLUMNS, "config", "split", "revision")


class _Split(TypedDict, total=False):
    """How to split a table."""

    split_seed: int
    max_rows: int


def load_task(ref: str, *, bbh: Path | None = None) -> Task:
    """Load the task `ref`; with `bbh`, from that folder of BIG-Bench Hard files.

    Raises:
        InputError: no such task, or a problem in it; the message says where.
    """
    name, options = _parse(ref)
    if bbh is not None:
        return load_bbh(bbh, name, **_split(ref, options, _SPLIT_OPTIONS))
    if name.startswith("hub:"):
        return _load_hub(ref, name.removeprefix("hub:"), options)
    if name.endswith(".jsonl"):
        split = _split(ref, options, _COLUMNS)
        records = jsonl_records(user_path(name), **_columns(options))
        return task_from_table(task_name(name), records, **split)
    if name.endswith(".json"):
        path = user_path(name)
        return load_bbh(path.parent, path.stem, **_split(ref, options, _SPLIT_OPTIONS))
    _split(ref, options, ())
    return load_folder(_folder(name))


def find_folder(ref: str) -> Path | None:
    """Return the task folder `ref`, or None if it is a table without splits.

    Raises:
        InputError: no shipped task has this name, or there is no such folder.
    """
    name, _ = _parse(ref)
    return None if name.startswith("hub:") or name.endswith((".jsonl", ".json")) else _folder(name)


def _load_hub(ref: str, name: str, options: dict[str, str]) -> Task:
    split = _split(ref, options, _HUB)
    records = hub_records(
        name,
        **_columns(options),
        split=options.get("split", "train"),
        config=options.get("config"),
        revision=options.get("revision"),
    )
    return task_from_table(task_name(name), records, **split)


def _folder(name: str) -> Path:
    if name not in catalog.names("tasks") and Path(name, "task.toml").is_file():
        return Path(name)  # a folder in the working directory, given without ./
    path = catalog.find("tasks", name)
    return path.parent if path.name == "task.toml" else path


def _parse(ref: str) -> tuple[str, dict[str, str]]:
    if "?" not in ref or Path(ref).exists():
        return ref, {}
    name, _, query = ref.partition("?")
    return name, dict(parse_qsl(query, keep_blank_values=True))


def _columns(options: dict[str, str]) -> dict[str, str]:
    return {f"{key}_column": options[key] for key in ("input", "target") if key in options}


def _split(ref: str, options: dict[str, str], known: tuple[str, ...]) -> _Split:
    """Check that `options` are `known`; return those about splitting."""
    for key in options:
        if key not in known:
            hint = nearest(key, known) or "A task folder has its own splits and no options."
            raise InputError(f"{ref}: unknown option '{key}'", hint)
    found: _Split = {}
    if "seed" in options:
        found["split_seed"] = _integer(ref, "seed", options["seed"])
    if "rows" in options:
        found["max_rows"] = _integer(ref, "rows", options["rows"])
    return found


def _integer(ref: str, key: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal()):
        raise InputError(f"{ref}: {key} must be a whole number, not '{value}'", f"For example {key}=1.")
    return int(value)

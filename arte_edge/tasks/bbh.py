"""Loads tasks in the layout of BIG-Bench Hard: a folder of ``<task>.json`` with "examples".

The published files carry no splits, so a seeded one is made; they carry no description
either, so ours (``prose/bbh.toml``) tells the teacher what the task is. The technique
prompts go by the four groups of the ARTE paper: logic, commonsense, mathematics, knowledge.
"""

from __future__ import annotations

import json
from pathlib import Path

from arte_edge.errors import InputError, nearest
from arte_edge.tasks.table import Record, prose, task_from_table
from arte_edge.tasks.task import Task, WorkedExample

__all__ = ["bbh_names", "load_bbh"]


def bbh_names(folder: Path) -> list[str]:
    """Return the names of the tasks in `folder`, sorted.

    Raises:
        InputError: no such folder, or no JSON file in it.
    """
    names = sorted(path.stem for path in folder.glob("*.json"))
    if not names:
        what = "has no JSON files" if folder.is_dir() else "is no folder"
        raise InputError(f"{folder} {what}", "--bbh takes a folder of BIG-Bench Hard's <task>.json files.")
    return names


def load_bbh(folder: Path, name: str, *, split_seed: int = 0, max_rows: int | None = None) -> Task:
    """Load the task `name` from `folder`, split by `split_seed`.

    Raises:
        InputError: no such folder or task, or a file that is not in the layout.
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
        worked=tuple(WorkedExample.model_validate(item) for item in worked)
        if isinstance(worked, list)
        else (),
    )


def _read(path: Path) -> list[Record]:
    hint = 'The layout is {"examples": [{"input": "...", "target": "..."}, ...]}.'
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["examples"]
        return [
            Record(f"{path.name}:examples[{index}]", str(row["input"]), str(row["target"]))
            for index, row in enumerate(rows)
        ]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not in the layout of BIG-Bench Hard ({error!r})", hint) from error

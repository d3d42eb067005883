"""From a reference to a task, whatever kind of reference it is.

=========================  ==================================================
reference                  what it is
=========================  ==================================================
``home_intents``           a shipped task
``./my_task``              a task folder
``data.jsonl?input=q``     a labelled file, split by us
``hub:org/name?split=…``   a dataset of the Hub, or ``hub:./folder``
``bbh/navigate.json``      a task in the layout of BIG-Bench Hard
``navigate``, with `bbh`   the same, from the folder `bbh`
=========================  ==================================================

Options follow a question mark, as in an address. A table that we split takes
``seed`` (of the split, 0) and ``rows`` (how many of them); a labelled file and a Hub
dataset take ``input`` and ``target`` (column names); a Hub dataset ``config``,
``split`` and ``revision``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict
from urllib.parse import parse_qsl

from arte_edge import catalog
from arte_edge.errors import InputError, nearest
from arte_edge.tasks.bbh import load_bbh
from arte_edge.tasks.columns import hub_records, jsonl_records, task_name
from arte_edge.tasks.folder import load_folder
from arte_edge.tasks.table import task_from_table
from arte_edge.tasks.task import Task

__all__ = ["find_folder", "load_task"]

_SPLITTING = ("seed", "rows")
_COLUMNS = (*_SPLITTING, "input", "target")
_HUB = (*_COLUMNS, "config", "split", "revision")


class _How(TypedDict, total=False):
    """The options that say how a table is split."""

    split_seed: int
    max_rows: int


def load_task(ref: str, *, bbh: Path | None = None) -> Task:
    """Load the task that `ref` names; with `bbh`, from that folder of BIG-Bench Hard files.

    Raises:
        InputError: there is no such task, or something in it is wrong; the message says where.
    """
    name, options = _parse(ref)
    if bbh is not None:
        return load_bbh(bbh, name, **_splitting(ref, options, _SPLITTING))
    if name.startswith("hub:"):
        return _load_hub(ref, name.removeprefix("hub:"), options)
    if name.endswith(".jsonl"):
        how = _splitting(ref, options, _COLUMNS)
        records = jsonl_records(Path(name).expanduser(), **_columns(options))
        return task_from_table(task_name(name), records, **how)
    if name.endswith(".json"):
        path = Path(name).expanduser()
        return load_bbh(path.parent, path.stem, **_splitting(ref, options, _SPLITTING))
    _splitting(ref, options, ())
    return load_folder(_folder(name))


def find_folder(ref: str) -> Path | None:
    """Return the task folder that `ref` names, or None if it is a table that we split ourselves.

    Raises:
        InputError: no shipped task has this name, or there is no such folder.
    """
    name, _ = _parse(ref)
    return None if name.startswith("hub:") or name.endswith((".jsonl", ".json")) else _folder(name)


def _load_hub(ref: str, name: str, options: dict[str, str]) -> Task:
    how = _splitting(ref, options, _HUB)
    records = hub_records(
        name,
        **_columns(options),
        split=options.get("split", "train"),
        config=options.get("config"),
        revision=options.get("revision"),
    )
    return task_from_table(task_name(name), records, **how)


def _folder(name: str) -> Path:
    if name not in catalog.names("tasks") and Path(name, "task.toml").is_file():
        return Path(name)  # a folder beside us, named without ./
    path = catalog.find("tasks", name)
    return path.parent if path.name == "task.toml" else path


def _parse(ref: str) -> tuple[str, dict[str, str]]:
    if "?" not in ref or Path(ref).exists():
        return ref, {}
    name, _, query = ref.partition("?")
    return name, dict(parse_qsl(query, keep_blank_values=True))


def _columns(options: dict[str, str]) -> dict[str, str]:
    return {f"{key}_column": options[key] for key in ("input", "target") if key in options}


def _splitting(ref: str, options: dict[str, str], known: tuple[str, ...]) -> _How:
    """Check that `options` are `known` and return those that say how to split."""
    for key in options:
        if key not in known:
            hint = nearest(key, known) or "A task folder has its own splits: it takes no options."
            raise InputError(f"{ref}: unknown option '{key}'", hint)
    how: _How = {}
    if "seed" in options:
        how["split_seed"] = _whole(ref, "seed", options["seed"])
    if "rows" in options:
        how["max_rows"] = _whole(ref, "rows", options["rows"])
    return how


def _whole(ref: str, key: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal()):
        raise InputError(f"{ref}: {key} must be a whole number, not '{value}'", f"For example {key}=1.")
    return int(value)

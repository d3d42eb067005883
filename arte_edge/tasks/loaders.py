"""Load a task from any kind of reference: a name, a folder, a table, a dataset (docs/tasks.md lists them).

Options follow a question mark, as in a URL. Tables without splits are split by a seed. BIG-Bench Hard's files have
no description either: it and the technique prompts come from ``prose/bbh.toml``, in the four groups of the ARTE
paper: logic, commonsense, mathematics, knowledge.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from arte_edge import catalog
from arte_edge.errors import ArteError, InputError, first_line, nearest
from arte_edge.extras import need
from arte_edge.files import user_path
from arte_edge.tasks.folder import load_folder
from arte_edge.tasks.from_table import SPLIT, Split, prose, task_from_table
from arte_edge.tasks.tables import GUESSED, SUFFIXES, Columns, Source, Table, arrow_source, open_table, read_table
from arte_edge.tasks.task import FewShotExample, Task

_TEXT = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
# Written by `Dataset.save_to_disk`; not in a folder of data files.
_SAVED_DATASET = ("dataset_dict.json", "state.json")


def task_name(ref: str) -> str:
    """Return a task name from the last part of `ref`: ``data/My Set.jsonl`` gives ``my_set``."""
    last = ref.rstrip("/").rsplit("/", 1)[-1]
    last = re.sub(r"\.\w{3,7}$", "", last) if last.lower().endswith(SUFFIXES) else last
    return re.sub(r"[^a-z0-9]+", "_", last.lower()).strip("_") or "task"


def hub_table(
    name: str,
    columns: Columns = GUESSED,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
) -> Table:
    """Read a split of the Hub dataset `name`, or of a dataset in a local folder.

    CSV and JSON files are read by `arte_edge.tasks.tables`, because the `datasets` library types their cells.

    Raises:
        InputError: no such dataset, configuration, split or column.
        ArteError: the `datasets` library is missing, or the dataset cannot be loaded.
    """
    if find_spec("datasets") is None:
        need("train", "Loading a Hub dataset")
    import datasets

    data: Any = None
    try:
        if any((Path(name) / marker).is_file() for marker in _SAVED_DATASET):
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, dict) else data
        else:
            builder = datasets.load_dataset_builder(name, config, revision=revision)
            features, files = builder.info.features, builder.config.data_files or {}
            if files and all(_plain(file).endswith(_TEXT) for part in files.values() for file in part):
                paths = datasets.DownloadManager().download_and_extract(list(files[split]))
                opened = zip(paths, files[split], strict=True)
                source = _joined([open_table(Path(path), _plain(file)) for path, file in opened])
            else:
                data = datasets.load_dataset(name, config, split=split, revision=revision)
    except ArteError:
        raise
    except (FileNotFoundError, ValueError, KeyError) as error:
        what = f"hub:{name}: the dataset, its configuration or its split '{split}' does not exist"
        hint = "Options: hub:org/name?config=…&split=…."
        raise InputError(f"{what} ({first_line(error):.200})", hint) from error
    except OSError as error:
        what = f"hub:{name} cannot be reached ({first_line(error):.200})"
        raise ArteError(what, "Try again with network access.") from error
    except Exception as error:  # what the library raises depends on the files
        hint = "Save a column of inputs and one of answers as CSV, JSONL or Parquet, and pass that file."
        what = f"hub:{name} cannot be loaded ({first_line(error.__cause__ or error):.200})"
        raise InputError(what, hint) from error
    if data is not None:
        features = data.features
        source = arrow_source(f"hub:{name}", lambda: data.with_format("arrow").iter(10_000))
    names = {key: f.names for key, f in (features or {}).items() if isinstance(f, datasets.ClassLabel)}
    return read_table(source, columns, name=f"hub:{name}[{split}]", label_names=names)


def _joined(sources: Sequence[Source]) -> Source:
    """Return the rows of several files of one split, numbered through."""
    by_name = (
        dict(zip(source.columns, row, strict=False)) if isinstance(row, list) else row
        for source in sources
        for _, row in source.rows
    )
    return Source(sources[0].columns, enumerate(by_name), form=sources[0].form)


def _plain(file: str) -> str:
    """Return a file's name in lower case without the ending of its compression."""
    return re.sub(r"\.(gz|bz2|xz|zst|lz4)$", "", file.lower().partition("?")[0])


def bbh_names(folder: Path) -> list[str]:
    """Return the names of the tasks in `folder`, sorted; raise `InputError` if it has no JSON files."""
    names = sorted(path.stem for path in folder.glob("*.json"))
    if not names:
        what = "has no JSON files" if folder.is_dir() else "is not a folder"
        raise InputError(f"{folder} {what}", "--bbh takes a folder of BIG-Bench Hard's <task>.json files.")
    return names


def load_bbh(folder: Path, name: str, split: Split = SPLIT, columns: Columns = GUESSED) -> Task:
    """Load the task `name` from `folder`; raise `InputError` without it, or if its file is no table."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise InputError(f"No task '{name}' in {folder}", nearest(name, bbh_names(folder)))
    about = prose("bbh")
    ours = about["tasks"].get(name, {})
    return task_from_table(
        name,
        read_table(path, columns),
        split,
        description=ours.get("description", ""),
        techniques=tuple(about["techniques"].get(ours.get("group"), ())),
        worked=tuple(map(FewShotExample.model_validate, ours.get("worked", ()))),
    )


_SPLITTING = ("seed", "rows")  # the options about splitting
_OPTIONS = (*_SPLITTING, "input", "target")
_HUB = (*_OPTIONS, "config", "split", "revision")


def load_task(ref: str, *, bbh: Path | None = None) -> Task:
    """Load the task `ref`; with `bbh`, from that folder of BIG-Bench Hard files; an `InputError` says what is wrong."""
    name, options = _parse(ref)
    path = user_path(name)
    if bbh is not None or (name.endswith(".json") and path.is_file()):
        split = _split(ref, options, _OPTIONS)
        folder, name = (bbh, name) if bbh else (path.parent, path.stem)
        return load_bbh(folder, name, split, (options.get("input"), options.get("target")))
    if _is_table(name):
        return task_from_table(task_name(name), *load_table(ref))
    _split(ref, options, ())
    return load_folder(_folder(name))


def load_table(ref: str, columns: Columns = GUESSED) -> tuple[Table, Split]:
    """Read the labelled file or Hub dataset `ref`, whose options go before `columns`; also how to split it."""
    name, options = _parse(ref)
    split = _split(ref, options, _HUB if name.startswith("hub:") else _OPTIONS)
    columns = (options.get("input", columns[0]), options.get("target", columns[1]))
    if not name.startswith("hub:"):
        return read_table(user_path(name), columns), split
    config, revision = options.get("config"), options.get("revision")
    name, part = name.removeprefix("hub:"), options.get("split", "train")
    return hub_table(name, columns, split=part, config=config, revision=revision), split


def find_folder(ref: str) -> Path | None:
    """Return the task folder `ref`, None if it is a table; raise `InputError` if there is no such name or folder."""
    name, _ = _parse(ref)
    return None if _is_table(name) else _folder(name)


def _is_table(name: str) -> bool:
    path = user_path(name)
    other = path.is_file() and path.suffix != ".toml"  # to be told which kinds there are
    return name.startswith("hub:") or name.lower().endswith(SUFFIXES) or other


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


def _split(ref: str, options: dict[str, str], known: tuple[str, ...]) -> Split:
    """Check that `options` are `known`; return those about splitting."""
    for key, value in options.items():
        if key not in known:
            hint = nearest(key, known) or "A task folder has its own splits and no options."
            raise InputError(f"{ref}: unknown option '{key}'", hint)
        if key in _SPLITTING and not (value.isascii() and value.isdecimal()):
            raise InputError(f"{ref}: {key} must be a whole number, not '{value}'", f"For example {key}=1.")
    return Split(**{key: int(options[key]) for key in _SPLITTING if key in options})

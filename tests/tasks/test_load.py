"""References to tasks of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arte_edge import catalog
from arte_edge.errors import InputError
from arte_edge.tasks.load import find_folder, load_task

Write = Callable[[Path, list[dict[str, Any]]], Path]
ROWS = [{"q": f"Is {n} even?", "a": "no" if n % 2 else "yes"} for n in range(80)]


@pytest.mark.parametrize("name", catalog.names("tasks"))
def test_a_shipped_name_loads(name: str) -> None:
    assert load_task(name).name == name


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        load_task("home_intent")
    assert caught.value.hint == "Did you mean 'home_intents'?"


def test_a_folder_is_named_by_its_path_or_its_task_file(
    parity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parity.parent)
    identities = {load_task(ref).sha256 for ref in (str(parity), "./parity", "parity", "parity/task.toml")}
    assert len(identities) == 1


def test_a_labelled_file_takes_options_after_a_question_mark(tmp_path: Path, write_jsonl: Write) -> None:
    path = write_jsonl(tmp_path / "My data.jsonl", ROWS)
    task = load_task(f"{path}?input=q&target=a&seed=7&rows=60")
    assert (task.name, task.split_seed, len(task.seed)) == ("my_data", 7, 16)


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ("input=q&traget=a", "unknown option 'traget'", "Did you mean 'target'?"),
        ("input=q&target=a&seed=x", "seed must be a whole number, not 'x'", "For example seed=1."),
        ("input=q&target=a&rows=-1", "rows must be a whole number", "For example rows=1."),
        ("split=train", "unknown option 'split'", ""),
    ],
)
def test_a_bad_option_is_an_input_error(
    tmp_path: Path, write_jsonl: Write, options: str, message: str, hint: str
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    with pytest.raises(InputError, match=message) as caught:
        load_task(f"{path}?{options}")
    assert hint in caught.value.hint


def test_a_task_folder_takes_no_options(parity: Path) -> None:
    with pytest.raises(InputError, match="unknown option 'seed'"):
        load_task(f"{parity}?seed=1")


def test_bigbench_hard_is_named_by_folder_or_by_file(tmp_path: Path) -> None:
    rows = [{"input": row["q"], "target": row["a"]} for row in ROWS]
    (tmp_path / "even.json").write_text(json.dumps({"examples": rows}), encoding="utf-8")
    by_folder = load_task("even?seed=2", bbh=tmp_path)
    by_file = load_task(f"{tmp_path / 'even.json'}?seed=2")
    assert by_folder.sha256 == by_file.sha256 != load_task("even", bbh=tmp_path).sha256


def test_a_hub_dataset_loads_with_its_options(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    datasets.DatasetDict({"all": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "even-set"))
    task = load_task(f"hub:{tmp_path / 'even-set'}?split=all&input=q&target=a")
    assert (task.name, task.answer.choices, task.split_seed) == ("even_set", ("no", "yes"), 0)


def test_only_folders_are_found_as_folders(parity: Path) -> None:
    assert find_folder(str(parity)) == parity
    assert find_folder("home_intents") == catalog.find("tasks", "home_intents")
    assert [find_folder(ref) for ref in ("d.jsonl", "hub:org/name", "x.json?seed=1")] == [None] * 3

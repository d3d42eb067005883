"""Labelled tables with columns of any name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arte_edge.errors import ArteError, InputError
from arte_edge.tasks.columns import hub_records, jsonl_records, task_name
from arte_edge.tasks.table import Record

Write = Callable[[Path, list[dict[str, Any]]], Path]
needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the datasets library is not installed"
)
ROWS = [{"sentence": f"number {n}", "label": n % 2} for n in range(4)]


def test_a_labelled_file_is_read_by_column_names(tmp_path: Path, write_jsonl: Write) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    assert jsonl_records(path, "sentence", "label")[1] == Record("d.jsonl:2", "number 1", "1")


def test_a_wrong_column_names_the_nearest(tmp_path: Path, write_jsonl: Write) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    with pytest.raises(InputError, match=r"d.jsonl:1: no column 'sentense'") as caught:
        jsonl_records(path, "sentense", "label")
    assert "Did you mean 'sentence'?" in caught.value.hint


@pytest.mark.parametrize("cell", [None, [], {"a": 1}, " "])
def test_a_cell_that_is_no_text_is_named(tmp_path: Path, write_jsonl: Write, cell: object) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*ROWS, {"sentence": "x", "label": cell}])
    with pytest.raises(InputError, match=r"d.jsonl:5: column 'label' holds"):
        jsonl_records(path, "sentence", "label")


def test_bad_json_and_a_missing_file_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        jsonl_records(tmp_path / "none.jsonl")
    (tmp_path / "d.jsonl").write_text('{"input": "x"}\n{', encoding="utf-8")
    with pytest.raises(InputError, match=r"d.jsonl:2: not JSON"):
        jsonl_records(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("ref", "name"),
    [("data/My Set.jsonl", "my_set"), ("org/SST-2", "sst_2"), ("./x/", "x"), ("???", "task"), ("ünï", "n")],
)
def test_a_name_is_made_of_the_reference(ref: str, name: str) -> None:
    assert task_name(ref) == name


@needs_datasets
def test_a_saved_dataset_is_read_with_the_names_of_its_class_labels(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["even", "odd"])}
    )
    data = datasets.Dataset.from_list(ROWS, features=features)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(str(tmp_path / "two"))
    one = hub_records(str(tmp_path / "one"), "sentence", "label")
    assert [(record.input, record.target) for record in one[:2]] == [
        ("number 0", "even"),
        ("number 1", "odd"),
    ]
    two = hub_records(str(tmp_path / "two"), "sentence", "label", split="test")
    assert [record.input for record in two] == ["number 2"]
    with pytest.raises(InputError, match="its split 'dev' is not there"):
        hub_records(str(tmp_path / "two"), split="dev")


@needs_datasets
def test_a_folder_of_data_files_is_a_dataset(
    tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", ROWS)
    records = hub_records(str(tmp_path / "data"), "sentence", "label")
    assert [record.target for record in records] == ["0", "1", "0", "1"]


@needs_datasets
def test_a_dataset_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hub:.*none: the dataset"):
        hub_records(str(tmp_path / "none"))


def test_without_the_datasets_library_the_pip_command_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_name: str) -> None:
        return None

    monkeypatch.setattr("arte_edge.tasks.columns.find_spec", nothing)
    monkeypatch.setattr("arte_edge.extras.find_spec", nothing)
    with pytest.raises(ArteError) as caught:
        hub_records("org/name")
    assert caught.value.hint == "pip install 'arte-edge[train]'"

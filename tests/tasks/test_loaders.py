"""References to tasks: labelled files, datasets, BIG-Bench Hard, shipped tasks."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Patch

from arte_edge import catalog
from arte_edge.errors import ArteError, InputError
from arte_edge.tasks.from_table import Record, prose
from arte_edge.tasks.loaders import (
    bbh_names,
    find_folder,
    hub_records,
    jsonl_records,
    load_bbh,
    load_task,
    task_name,
)
from arte_edge.tasks.task import content_key

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
def test_a_cell_that_is_not_text_is_named(tmp_path: Path, write_jsonl: Write, cell: object) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*ROWS, {"sentence": "x", "label": cell}])
    with pytest.raises(InputError, match=r"d.jsonl:5: column 'label' is"):
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
def test_a_name_comes_from_the_reference(ref: str, name: str) -> None:
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
    with pytest.raises(InputError, match="its split 'dev' does not exist"):
        hub_records(str(tmp_path / "two"), split="dev")


@needs_datasets
def test_a_folder_of_data_files_is_a_dataset(tmp_path: Path, write_jsonl: Write, monkeypatch: Patch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", ROWS)
    records = hub_records(str(tmp_path / "data"), "sentence", "label")
    assert [record.target for record in records] == ["0", "1", "0", "1"]


@needs_datasets
def test_a_missing_dataset_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hub:.*none: the dataset"):
        hub_records(str(tmp_path / "none"))


def test_without_the_datasets_library_the_hint_is_a_pip_command(monkeypatch: Patch) -> None:
    def nothing(_name: str) -> None:
        return None

    monkeypatch.setattr("arte_edge.tasks.loaders.find_spec", nothing)
    monkeypatch.setattr("arte_edge.extras.find_spec", nothing)
    with pytest.raises(ArteError) as caught:
        hub_records("org/name")
    assert caught.value.hint == "pip install 'arte-edge[train]'"


ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = Path(os.environ.get("ARTE_EDGE_BBH", ROOT.parent / "shared" / "bbh"))
KINDS = {
    "boolean": {"boolean_expressions"},
    "number": {"multistep_arithmetic_two", "object_counting"},
    "text": {"dyck_languages", "word_sorting"},
}
LABELS = {
    "causal_judgement": ("No", "Yes"),
    "formal_fallacies": ("invalid", "valid"),
    "navigate": ("No", "Yes"),
    "sports_understanding": ("no", "yes"),
    "web_of_lies": ("No", "Yes"),
}


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    rows = [{"input": f"{n}?\nOptions:\n(A) even\n(B) odd", "target": f"({'AB'[n % 2]})"} for n in range(60)]
    (tmp_path / "parity.json").write_text(json.dumps({"canary": "", "examples": rows}), encoding="utf-8")
    return tmp_path


def test_a_file_in_the_layout_loads(layout: Path) -> None:
    task = load_bbh(layout, "parity", split_seed=5)
    assert (task.name, task.split_seed, task.answer.letters) == ("parity", 5, True)
    assert task.seed[0].target in task.answer.options(task.seed[0].input)
    assert bbh_names(layout) == ["parity"]


def test_an_unknown_task_or_folder_is_an_input_error(layout: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_bbh(layout, "paritty")
    assert caught.value.hint == "Did you mean 'parity'?"
    with pytest.raises(InputError, match="is not a folder"):
        load_bbh(layout / "none", "parity")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rows": []}', '{"examples": [{"input": "x"}]}', '{"examples": 4}']
)
def test_a_file_in_another_layout_is_an_input_error(layout: Path, text: str) -> None:
    (layout / "parity.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="not in the layout of BIG-Bench Hard"):
        load_bbh(layout, "parity")


def test_all_27_published_tasks_have_our_description_and_a_group() -> None:
    about = prose("bbh")
    assert len(about["tasks"]) == 27
    for name, task in about["tasks"].items():
        assert isinstance(task, dict)
        assert len(task["description"]) > 40, name
        assert task["group"] in about["techniques"], name
    for techniques in about["techniques"].values():
        assert isinstance(techniques, list)
        assert len(set(techniques)) == 4


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"no BIG-Bench Hard files in {PUBLISHED} (ARTE_EDGE_BBH)")
def test_all_27_published_files_load_with_the_right_kind() -> None:
    names = bbh_names(PUBLISHED)
    assert names == sorted(prose("bbh")["tasks"])
    for name in names:
        task = load_bbh(PUBLISHED, name)
        kind = next((kind for kind, members in KINDS.items() if name in members), "choice")
        assert (task.answer.kind, task.answer.choices) == (kind, LABELS.get(name, ())), name
        assert len(task.seed) == 40, name
        assert 60 <= len(task.validation) <= 100, name
        assert len(task.test_keys()) >= 45, name
        assert len(task.notes) <= 2, name


def test_few_shot_examples_are_not_in_the_validation_or_test_split(tmp_path: Path) -> None:
    worked = prose("bbh")["tasks"]["boolean_expressions"]["worked"]  # type: ignore[index]
    shown = [example["input"] for example in worked]
    rows = [{"input": f"{text} ", "target": "True"} for text in shown]
    rows += [{"input": f"True and {'not not ' * n}True is", "target": "True"} for n in range(1, 60)]
    rows += [{"input": f"False and {'not not ' * n}True is", "target": "False"} for n in range(1, 60)]
    (tmp_path / "boolean_expressions.json").write_text(json.dumps({"examples": rows}), encoding="utf-8")
    task = load_bbh(tmp_path, "boolean_expressions")
    hidden = {example.key for example in (*task.validation, *task.load_test())}
    kept = [example.input for example in task.worked]
    assert 0 < len(kept) < len(shown) and set(kept) < set(shown)
    assert not {content_key(text) for text in kept} & hidden
    assert any(f"left out {len(shown) - len(kept)} few-shot examples" in note for note in task.notes)


QUESTIONS = [{"q": f"Is {n} even?", "a": "no" if n % 2 else "yes"} for n in range(80)]


@pytest.mark.parametrize("name", catalog.names("tasks"))
def test_a_shipped_name_loads(name: str) -> None:
    assert load_task(name).name == name


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        load_task("home_intent")
    assert caught.value.hint == "Did you mean 'home_intents'?"


def test_a_folder_is_named_by_its_path_or_its_task_file(parity: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(parity.parent)
    identities = {load_task(ref).sha256 for ref in (str(parity), "./parity", "parity", "parity/task.toml")}
    assert len(identities) == 1


def test_a_labelled_file_has_options_after_a_question_mark(tmp_path: Path, write_jsonl: Write) -> None:
    path = write_jsonl(tmp_path / "My data.jsonl", QUESTIONS)
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
    path = write_jsonl(tmp_path / "d.jsonl", QUESTIONS)
    with pytest.raises(InputError, match=message) as caught:
        load_task(f"{path}?{options}")
    assert hint in caught.value.hint


def test_a_task_folder_has_no_options(parity: Path) -> None:
    with pytest.raises(InputError, match="unknown option 'seed'"):
        load_task(f"{parity}?seed=1")


def test_bigbench_hard_is_named_by_folder_or_by_file(tmp_path: Path) -> None:
    rows = [{"input": row["q"], "target": row["a"]} for row in QUESTIONS]
    (tmp_path / "even.json").write_text(json.dumps({"examples": rows}), encoding="utf-8")
    by_folder = load_task("even?seed=2", bbh=tmp_path)
    by_file = load_task(f"{tmp_path / 'even.json'}?seed=2")
    assert by_folder.sha256 == by_file.sha256 != load_task("even", bbh=tmp_path).sha256


def test_a_hub_dataset_loads_with_its_options(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    datasets.DatasetDict({"all": datasets.Dataset.from_list(QUESTIONS)}).save_to_disk(
        str(tmp_path / "even-set")
    )
    task = load_task(f"hub:{tmp_path / 'even-set'}?split=all&input=q&target=a")
    assert (task.name, task.answer.choices, task.split_seed) == ("even_set", ("no", "yes"), 0)


def test_only_folders_are_found_as_folders(parity: Path) -> None:
    assert find_folder(str(parity)) == parity
    assert find_folder("home_intents") == catalog.find("tasks", "home_intents")
    assert [find_folder(ref) for ref in ("d.jsonl", "hub:org/name", "x.json?seed=1")] == [None] * 3

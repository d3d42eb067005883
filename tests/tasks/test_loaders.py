"""References to tasks: labelled files, datasets, BIG-Bench Hard, shipped tasks."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Patch

from arte_edge import catalog
from arte_edge.errors import ArteError, InputError
from arte_edge.tasks.from_table import Split, prose
from arte_edge.tasks.loaders import bbh_names, find_folder, hub_table, load_bbh, load_task, task_name
from arte_edge.tasks.task import content_key

Write = Callable[[Path, list[dict[str, Any]]], Path]
ROWS = [{"sentence": f"number {n}", "label": n % 2} for n in range(4)]


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("data/My Set.jsonl", "my_set"),
        ("x.CSV", "x"),
        ("org/SST-2", "sst_2"),
        ("./x/", "x"),
        ("???", "task"),
        ("ünï", "n"),
    ],
)
def test_a_name_comes_from_the_reference(ref: str, name: str) -> None:
    assert task_name(ref) == name


def test_a_saved_dataset_is_read_with_the_names_of_its_class_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["even", "odd"])}
    )
    data = datasets.Dataset.from_list([*ROWS, {"sentence": "unlabelled", "label": -1}], features=features)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(str(tmp_path / "two"))
    one = hub_table(str(tmp_path / "one"))
    assert one.records[:2] == [(0, "number 0", "even"), (1, "number 1", "odd")]
    assert (len(one.records), one.columns) == (4, ("sentence", "label"))
    two = hub_table(str(tmp_path / "two"), ("sentence", "label"), split="test")
    assert [text for _, text, _ in two.records] == ["number 2"]
    with pytest.raises(InputError, match="its split 'dev' does not exist"):
        hub_table(str(tmp_path / "two"), split="dev")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A folder of data files for the `datasets` library, whose cache is a temporary one."""
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv", "train.csv.gz", "saved"])
def test_answers_of_a_dataset_stay_as_written(folder: Path, name: str) -> None:
    import datasets

    # as texts in a column with one bare number; the library alone reads 1.5, True, 5 and None
    rows = [{"text": "t", "label": target} for target in ("1.50", "true", "005", "NA", "x", 7)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    cells = "text,label\n" + "".join(f"t,{row['label']}\n" for row in rows)
    data = {".jsonl": lines, ".json": json.dumps(rows), ".csv": cells, ".gz": cells}.get(Path(name).suffix, "")
    if name == "saved":
        datasets.Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(str(folder))
    else:
        (folder / name).write_bytes(gzip.compress(data.encode()) if name.endswith("gz") else data.encode())
    answers = [target for _, _, target in hub_table(str(folder)).records]
    assert answers == ["1.50", "true", "005", "NA", "x", "7"]


CHAT = b'{"id": 1, "messages": [{"role": "user", "content": "x"}]}\n'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train.jsonl", CHAT * 60, "which column is the input"),
        ("train.jsonl", b'{"text": "x", "label": ["a"]}\n' * 60, "60 of 60 rows cannot be used"),
        ("train.csv", "text,label\na,b\n".encode("utf-16"), "UTF-16"),
        ("train.parquet", b"PAR1", "hub:.*: the dataset"),
        ("README", b"", "hub:.*: the dataset"),
    ],
)
def test_a_dataset_that_is_no_labelled_table_is_an_input_error(
    folder: Path, name: str, data: bytes, message: str
) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_task(f"hub:{folder}")
    assert caught.value.hint


def test_whatever_the_library_raises_names_the_dataset(monkeypatch: Patch) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")

    def fail(*_args: object, **_options: object) -> None:
        raise datasets.exceptions.DatasetGenerationError("An error") from TypeError("mixed chunks")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(InputError, match=r"hub:org/chat cannot be loaded \(mixed chunks\)"):
        hub_table("org/chat")


def test_without_the_datasets_library_the_hint_is_a_pip_command(monkeypatch: Patch) -> None:
    monkeypatch.setattr("arte_edge.tasks.loaders.find_spec", lambda _name: None)
    monkeypatch.setattr("arte_edge.extras.find_spec", lambda _name: None)
    with pytest.raises(ArteError) as caught:
        hub_table("org/name")
    assert caught.value.hint == "pip install 'arte-edge[train]'"


ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = Path(os.environ.get("ARTE_EDGE_BBH", ROOT.parent / "shared" / "bbh"))
KINDS = {"boolean_expressions": "boolean", "dyck_languages": "text", "word_sorting": "text"}
KINDS |= dict.fromkeys(("multistep_arithmetic_two", "object_counting"), "number")
LABELS = dict.fromkeys(("causal_judgement", "navigate", "web_of_lies"), ("No", "Yes"))
LABELS |= {"formal_fallacies": ("invalid", "valid"), "sports_understanding": ("no", "yes")}


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    rows = [{"input": f"{n}?\nOptions:\n(A) even\n(B) odd", "target": f"({'AB'[n % 2]})"} for n in range(60)]
    (tmp_path / "parity.json").write_text(json.dumps({"canary": "", "examples": rows}), encoding="utf-8")
    return tmp_path


def test_a_file_in_the_layout_loads(layout: Path) -> None:
    task = load_bbh(layout, "parity", Split(5))
    assert (task.name, task.split_seed, task.answer.letters) == ("parity", 5, True)
    assert task.seed[0].target in task.answer.options(task.seed[0].input)
    assert bbh_names(layout) == ["parity"]


def test_an_unknown_task_or_folder_is_an_input_error(layout: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'parity'"):
        load_bbh(layout, "paritty")
    with pytest.raises(InputError, match="is not a folder"):
        load_bbh(layout / "none", "parity")


def test_a_file_that_is_not_there_is_no_matter_of_bbh(layout: Path) -> None:
    for missing in (layout / "tickets.json", layout / "none" / "tickets.json"):
        with pytest.raises(InputError, match=r"tickets\.json: no such file") as caught:
            load_task(str(missing))
        assert "bbh" not in caught.value.hint


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rows": []}', '{"examples": [{"input": "x"}]}', '{"examples": 4}', "[" * 99999]
)
def test_a_file_in_another_layout_is_an_input_error(layout: Path, text: str) -> None:
    (layout / "parity.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"parity\.json"):
        load_bbh(layout, "parity")


def test_all_27_published_tasks_have_our_description_and_a_group() -> None:
    about = prose("bbh")
    assert len(about["tasks"]) == 27
    for name, task in about["tasks"].items():
        assert isinstance(task, dict)
        assert len(task["description"]) > 40, name
        assert task["group"] in about["techniques"], name
    generic = [about["techniques"] for about in prose("generic").values()]
    assert len(generic) == 6
    assert all("one to three short sentences" in text for techniques in generic for text in techniques)
    for techniques in (*about["techniques"].values(), *generic):
        assert isinstance(techniques, list)
        assert len(set(techniques)) == 4


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"no BIG-Bench Hard files in {PUBLISHED} (ARTE_EDGE_BBH)")
def test_all_27_published_files_load_with_the_right_kind() -> None:
    names = bbh_names(PUBLISHED)
    assert names == sorted(prose("bbh")["tasks"])
    for name in names:
        task = load_bbh(PUBLISHED, name)
        kind = (KINDS.get(name, "choice"), LABELS.get(name, ()))
        assert (task.answer.kind, task.answer.choices) == kind, name
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


def test_a_folder_is_named_by_its_path_or_its_task_file(parity: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(parity.parent)
    with pytest.raises(InputError, match="unknown option 'seed'"):
        load_task("parity?seed=1")
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


def test_bigbench_hard_is_named_by_folder_or_by_file(tmp_path: Path) -> None:
    rows = [{"input": row["q"], "target": row["a"]} for row in QUESTIONS]
    (tmp_path / "even.json").write_text(json.dumps({"examples": rows}), encoding="utf-8")
    by_folder = load_task("even?seed=2", bbh=tmp_path)
    by_file = load_task(f"{tmp_path / 'even.json'}?seed=2")
    assert by_folder.sha256 == by_file.sha256 != load_task("even", bbh=tmp_path).sha256


def test_only_folders_are_found_as_folders(parity: Path) -> None:
    assert find_folder(str(parity)) == parity
    assert find_folder("home_intents") == catalog.find("tasks", "home_intents")
    assert [find_folder(ref) for ref in ("d.jsonl", "hub:org/name", "x.json?seed=1")] == [None] * 3

"""The layout of BIG-Bench Hard. The published files are public data that we do not carry."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from arte_edge.errors import InputError
from arte_edge.tasks.bbh import bbh_names, load_bbh
from arte_edge.tasks.table import prose
from arte_edge.tasks.task import content_key

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
    with pytest.raises(InputError, match="is no folder"):
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


def test_worked_examples_come_with_a_task_that_has_them_and_stand_in_no_hidden_split(tmp_path: Path) -> None:
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
    assert any(f"left out {len(shown) - len(kept)} worked examples" in note for note in task.notes)

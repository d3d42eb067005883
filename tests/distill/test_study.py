"""A study makes its runs once, on one store, and compares them; cut off anywhere it ends with the same table."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny import Capture, Patch

from arte_edge.cli.main import main

STUDY = """
tasks = ["parity"]
students = ["scripted-student"]
seeds = [0, 3]
{more}
[run]
teacher.model = "scripted-teacher"
elicit.by_label = true
tailor.questions = 8
calibrate.k = 6
prefer.race = "off"
[arms.original-teacher]
data = "original-teacher"
[arms.best-of-n]
data = "best-of-n"
"""


@pytest.fixture
def study(house: Any, tmp_path: Path, monkeypatch: Patch) -> Any:
    """Return a function that runs a study in a folder of this name and returns its exit code."""
    monkeypatch.setattr("arte_edge.distill.study.load_task", lambda ref, **_: house.task)
    house.learned = lambda rows: lambda n: n % (5 if len(rows) > 60 else len(rows)) > 0

    def start(name: str, more: str = "", extra: str = "") -> int:
        file = tmp_path / f"{name}.toml"
        file.write_text(STUDY.format(more=more) + extra)
        return main(["study", str(file), "--runs", str(tmp_path)])

    return start


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "study.json").read_text())
    return found


def test_runs_share_calls_stages_and_controls_and_the_table_compares_them(
    house: Any, study: Any, tmp_path: Path, capsys: Capture
) -> None:
    assert study("small") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    folder = tmp_path / "small"
    keys = Counter(json.loads(line)["key"] for line in (folder / "calls.jsonl").read_text().splitlines())
    assert max(keys.values()) == 1 and len(keys) > 200
    assert all((path.parent / "calls.jsonl").is_symlink() for path in folder.glob("*/run.toml"))
    # Two seeds: own labels with and without validation, two forms of a trial; and of each arm a student.
    trained = Counter(path.name for path in house.trained)
    assert trained["own-labels"] == trained["own-labels-all"] == 2 and trained["student"] == 4
    rows = {row["arm"]: row for row in result(folder)["rows"]}
    assert list(rows)[:3] == ["base student", "own labels", "own labels + validation"]
    for arm in ("original-teacher", "best-of-n"):
        for seed in (0, 3):
            run = folder / f"parity-scripted-student-{arm}-seed{seed}"
            summary = json.loads((run / "evaluate" / "manifest.json").read_text())["summary"]
            of = {row["model"]: row["accuracy"] for row in reversed(summary["rows"])}
            assert rows[arm]["by_seed"][str(seed)] == of["tuned student"]
            assert rows["own labels"]["by_seed"][str(seed)] == of["own labels"]
        found = rows[arm]["minus"]["own labels"]
        assert found["difference"] == pytest.approx(rows[arm]["accuracy"] - rows["own labels"]["accuracy"])
        assert found["low"] <= found["difference"] <= found["high"]
        assert f"{arm} " in shown and (folder / "study.html").read_text().count(arm) >= 1
    assert list(rows["best-of-n"]["minus"]) == ["own labels", "original-teacher"]
    selection = [run["stages"]["tailor"].get("selection") for run in result(folder)["runs"]]
    assert [bool(s) for s in selection] == [False, True] * 2
    assert not list(folder.rglob("*.safetensors")) and not list(folder.rglob("*-F16.gguf"))


def test_a_study_that_was_cut_off_goes_on_and_a_finished_one_costs_nothing(
    house: Any, study: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    assert study("whole") == 0
    calls, trainings, table = house.calls, len(house.trained), result(tmp_path / "whole")
    assert study("whole") == 0
    assert (house.calls, len(house.trained)) == (calls, trainings)
    train, left = house.train, iter(range(5))

    def dies(*args: Any, **more: Any) -> Any:
        if next(left, None) is None:
            raise MemoryError
        return train(*args, **more)

    with monkeypatch.context() as patch:
        for stage in ("own_labels", "tune"):
            patch.setattr(f"arte_edge.distill.stages.{stage}.train_sft", dies)
        assert study("cut") == 1
    assert study("cut") == 0
    assert house.calls == 2 * calls and result(tmp_path / "cut")["rows"] == table["rows"]


def test_a_run_that_stops_early_is_left_out_and_one_of_other_settings_shares_no_training(
    house: Any, study: Any, tmp_path: Path, capsys: Capture
) -> None:
    impossible = '[arms.none]\ndata = "original-teacher"\nelicit.max_prompts = 1\ntailor.max_prompts = 1\n'
    impossible += "tune.epochs = 3"
    assert study("some", extra=impossible) == 4
    said = capsys.readouterr()
    assert "2 of 6 runs stopped early" in said.err
    assert "Stopped early: parity-scripted-student-none-seed0: " in said.out
    arms = [row["arm"] for row in result(tmp_path / "some")["rows"]]
    assert "none" not in arms and "best-of-n" in arms
    assert Counter(path.name for path in house.trained)["own-labels"] == 4


@pytest.mark.parametrize(
    ("more", "extra", "why"),
    [
        ("", "[arms.x]\ndatum = 1", "unknown key 'datum'"),
        ("", '[arms."A b"]\ndata = "arte"', "arms.A b"),
        ('reference = "arte"', "", "is no arm"),
        ("sedes = [1]", "", "unknown key 'sedes'"),
    ],
)
def test_a_wrong_study_says_why_before_any_call(
    house: Any, study: Any, capsys: Capture, more: str, extra: str, why: str
) -> None:
    assert study("wrong", more, extra) == 2
    assert why in " ".join(capsys.readouterr().err.split())
    assert house.calls == 0

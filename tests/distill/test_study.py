"""A study makes its runs once, on one store, and compares them; cut off anywhere it ends with the same table."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny import Capture, Patch

from arte_edge.cli.main import main
from arte_edge.distill import run_context
from arte_edge.distill.aligned import aligned_teacher
from arte_edge.distill.stages import align
from arte_edge.distill.train.dpo import DpoResult
from arte_edge.distill.train.kl_target import HeldOut

STUDY = """
tasks = ["parity"]
students = ["scripted-student"]
seeds = {seeds}
{more}
[run]
{run}
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

    def start(name: str, more: str = "", extra: str = "", *, seeds: str = "[0, 3]", run: str = "") -> int:
        file = tmp_path / f"{name}.toml"
        file.write_text(STUDY.format(more=more, seeds=seeds, run=run) + extra)
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


def test_an_arm_that_is_added_to_a_finished_study_trains_what_was_dropped(
    house: Any, study: Any, tmp_path: Path
) -> None:
    assert study("more", seeds="[0]") == 0
    rows, trained = result(tmp_path / "more")["rows"], len(house.trained)
    assert study("more", extra='[arms.late]\ndata = "original-teacher"\ntune.epochs = 3', seeds="[0]") == 0
    found = {row["arm"]: row for row in result(tmp_path / "more")["rows"]}
    assert [found[row["arm"]] for row in rows] == rows and found["late"]["accuracy"] > 0
    assert len(house.trained) > trained and not list((tmp_path / "more").rglob("training.json"))


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
        for stage in ("check", "tune"):
            patch.setattr(f"arte_edge.distill.stages.{stage}.train_sft", dies)
        assert study("cut") == 1
    assert study("cut") == 0
    assert house.calls == 2 * calls and result(tmp_path / "cut")["rows"] == table["rows"]


def test_arms_of_one_alignment_train_it_once_and_leave_the_aligned_teacher(
    house: Any, study: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    trained: list[Path] = []

    def train(base: Path, pairs: Any, out: Path, settings: Any, *, held_out: Any, **_: Any) -> DpoResult:
        trained.append(out)
        held = HeldOut(0.1, len(held_out), len(held_out), 0.5)
        return DpoResult(out, 1, 1, "", len(pairs), 0, 0.0, held, (), ())

    house.teacher.say = lambda request, text, _: f"{sum(map(ord, request.prompt))} {text}"
    opens = run_context.open_local
    monkeypatch.setattr(run_context, "open_local", lambda model, adapter=None, **more: opens(model, **more))
    monkeypatch.setattr(align, "train_dpo", train)
    monkeypatch.setattr("arte_edge.gguf.from_base.adapter_to_gguf", lambda *paths: paths[-1].write_bytes(b"gguf"))
    more = "align.min_gap = 0.0\nalign.min_gap_errors = 0.0\ntune.target = 'answer-first'\ndata = 'arte'\n"
    arms = "".join(f"[arms.{data}]\ndata = '{data}'\n" for data in ("arte", "one-technique", "random"))
    assert study("aligned", "", arms, seeds="[0]", run=more) == 0
    names = [f"parity-scripted-student-{arm}-seed0" for arm in ("arte", "random")]
    assert [path.parents[1].name for path in trained] == names
    folder = tmp_path / "aligned" / "parity-scripted-student-one-technique-seed0"
    teacher = aligned_teacher(str(folder))
    assert teacher is not None and (teacher.folder / "adapter.gguf").read_bytes() == b"gguf"
    runs = {run["arm"]: run["stages"] for run in result(tmp_path / "aligned")["runs"]}
    assert runs["arte"]["align"] == runs["one-technique"]["align"] != runs["random"]["align"]


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
        ("", '[arms.x]\ndata = "one-technique"', 'x-seed0: data = "one-technique" chooses among rationales'),
        ("", '[arms.x]\nteacher.model = "scriptd"', "x-seed0: teacher.model: "),
    ],
)
def test_a_wrong_study_says_why_before_any_call(
    house: Any, study: Any, capsys: Capture, more: str, extra: str, why: str
) -> None:
    assert study("wrong", more, extra) == 2
    assert why in " ".join(capsys.readouterr().err.split())
    assert house.calls == 0

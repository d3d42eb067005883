"""Stages apart: up to one, from one on, in a folder that moves, a share of a stage's calls; and a run made again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import Capture, Patch

from arte_edge.console import Reporter
from arte_edge.distill.part import Share, stages_of
from arte_edge.distill.pipeline import Outcome, run_pipeline
from arte_edge.errors import InputError

TABLES: dict[str, Any] = {"data": "original-teacher", "tailor": {"questions": 8}}
STAGES = ("check", "target", "tailor", "tune", "evaluate")


@pytest.fixture
def done(house: Any, tmp_path: Path) -> Any:
    """Run a part of a run, in a folder that may be another than the house's."""
    house.by_label = True

    def run(folder: Path | None = None, **part: Any) -> Outcome:
        return run_pipeline(house.config(**TABLES), folder or house.folder, Reporter(quiet=True), **part)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for stage in STAGES for path in (folder / stage).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def finished(folder: Path) -> list[str]:
    return [stage for stage in STAGES if (folder / stage / "manifest.json").is_file()]


def test_stages_that_are_run_one_after_the_other_make_what_one_command_makes(
    house: Any, done: Any, tmp_path: Path
) -> None:
    whole = done(tmp_path / "whole")
    spent, trainings = house.calls, len(house.trained)
    for n, stage in enumerate(STAGES[:-1], 1):
        part = done(until=stage)
        assert finished(house.folder) == list(STAGES[:n]) and stage in part.stopped and not part.evaluation
    assert done(until="evaluate").evaluation == whole.evaluation
    assert contents(house.folder) == contents(tmp_path / "whole")
    assert (house.calls, len(house.trained)) == (2 * spent, 2 * trainings)


def test_from_a_stage_on_everything_is_made_again_of_stored_calls(house: Any, done: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"check.* not done"):
        done(from_="tailor")
    done(until="check")
    with pytest.raises(InputError, match="target"):
        done(from_="tailor")
    first = done()
    before, spent, trained = contents(house.folder), house.calls, len(house.trained)
    old = {stage: (house.folder / stage / "manifest.json").stat().st_mtime_ns for stage in STAGES}
    assert done(from_="tailor").evaluation == first.evaluation
    assert contents(house.folder) == before and house.calls == spent
    assert len(house.trained) == trained + 2  # the student, and that of all own labels
    new = {stage: (house.folder / stage / "manifest.json").stat().st_mtime_ns for stage in STAGES}
    assert [stage for stage in STAGES if new[stage] != old[stage]] == ["tailor", "tune", "evaluate"]


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("stage", ["tune", "validate", "evaluate"])
def test_the_student_is_there_after_any_stage_is_made_again(house: Any, stage: str, rounds: int) -> None:
    house.by_label = True
    config = house.config(**TABLES, rounds=rounds)
    names = [name for name in stages_of(config) if name.startswith(stage)]
    first = run_pipeline(config, house.folder, Reporter(quiet=True))
    student = (house.folder / "tune" / "student" / "model.safetensors").read_bytes()
    for name in names:
        again = run_pipeline(config, house.folder, Reporter(quiet=True), from_=name)
        assert again.evaluation == first.evaluation
        assert (house.folder / "tune" / "student" / "model.safetensors").read_bytes() == student


def test_a_command_with_from_that_was_killed_resumes_where_it_was(house: Any, done: Any) -> None:
    done()

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    train, house.train = house.train, killed
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("arte_edge.distill.stages.tune.train_sft", killed)
        done(from_="tailor")
    made = (house.folder / "tailor" / "manifest.json").stat().st_mtime_ns
    house.train = train
    done(from_="tailor")
    assert (house.folder / "tailor" / "manifest.json").stat().st_mtime_ns == made
    done(from_="tailor")  # and once finished it begins anew
    assert (house.folder / "tailor" / "manifest.json").stat().st_mtime_ns != made


def test_a_half_run_goes_on_in_another_place_and_makes_nothing_twice(house: Any, done: Any, tmp_path: Path) -> None:
    done(until="tailor")
    spent, trained = house.calls, len(house.trained)
    moved = tmp_path / "other" / "machine"
    shutil.copytree(house.folder, moved, copy_function=shutil.copyfile)  # all times of files are new
    for path in moved.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".toml"):
            assert str(house.folder) not in path.read_text("utf-8"), path
    shutil.rmtree(house.folder)
    done(moved, until="tailor")
    assert (house.calls, len(house.trained)) == (spent, trained)
    assert done(moved).evaluation["rows"]


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"until": "align"}, "Its stages: check, target, tailor"),
        ({"from_": "tail"}, "--from tail"),
        ({"from_": "tune", "until": "check"}, "later stage"),
        ({"from_": "tune", "shard": "1/2"}, "exclude"),
        ({"shard": "3/2"}, "not a share"),
        ({"shard": "0/2"}, "not a share"),
        ({"shard": "1/2"}, "--until check"),
    ],
)
def test_a_part_that_cannot_be_is_an_error(done: Any, part: dict[str, str], says: str) -> None:
    with pytest.raises(InputError) as caught:
        done(**part)
    assert says in str(caught.value)


def test_the_stages_are_those_of_the_settings(house: Any) -> None:
    assert stages_of(house.config())[2:6] == ["elicit", "calibrate", "prefer", "align"]
    assert stages_of(house.config(data="best-of-n"))[1:4] == ["target", "calibrate", "tailor"]
    rounds = stages_of(house.config(rounds=2, **TABLES))
    assert rounds[2:] == ["tailor", "tune-1", "validate", "tailor-2", "tune-2", "validate-2", "evaluate"]


def test_shards_make_the_calls_of_a_stage_and_the_plain_command_finishes_it(
    house: Any, done: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("arte_edge.distill.part._BRIEF_S", 0.0)  # the others have run, or will
    whole = done(tmp_path / "whole")
    spent = house.calls
    done(until="target")
    before = house.calls
    for _ in range(40):
        made = house.calls
        said = [done(shard=f"{i}/3").stopped for i in (1, 2, 3)]
        if house.calls == made:
            break
    assert all("without --shard" in text for text in said)
    assert not (house.folder / "tailor").exists()  # a shard writes its own file and nothing else
    by_shards = house.calls - before
    assert by_shards
    assert len(list(house.folder.glob("calls-*-of-3.jsonl"))) == 3
    assert done(until="tailor").calls_made == 0
    assert house.calls == before + by_shards and not list(house.folder.glob("calls-*-of-3.jsonl"))
    assert done().evaluation == whole.evaluation and house.calls == 2 * spent
    assert contents(house.folder) == contents(tmp_path / "whole")


def test_the_command_says_where_it_stopped_and_succeeds(house: Any, capfd: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr("arte_edge.distill.part._BRIEF_S", 0.0)
    house.by_label = True
    flags = ["--force", "--set", "data=original-teacher", "--set", "tailor.questions=8"]
    assert house.distill(*flags, "--until", "check") == 0
    assert "Stopped after check" in capfd.readouterr().err
    assert house.distill(*flags, "--until", "check", "--json") == 0
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert last["event"] == "done" and "Stopped after check" in last["stopped"]
    assert house.distill(*flags, "--shard", "2/2") == 0
    assert house.distill(*flags, "--from", "tailor") == 2
    assert house.distill(*flags, "--json") == 0
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert last["event"] == "done" and last["stopped"] == "" and last["rows"]


def test_a_share_is_read_as_it_is_written() -> None:
    assert str(Share.parse("2/4")) == "2/4"
    assert [Share.parse("2/4").owns(group) for group in range(5)] == [False, True, False, False, False]


@pytest.mark.parametrize("stage", ["", *STAGES])
def test_a_finished_run_costs_nothing_and_a_stage_that_was_cut_off_is_made_from_the_store(
    house: Any, done: Any, stage: str
) -> None:
    first = done()
    assert first.folder == house.folder
    before, spent, trainings = contents(house.folder), house.calls, len(house.trained)
    assert {name.partition("/")[0] for name in before} == set(STAGES)
    if stage:
        (house.folder / stage / "manifest.json").unlink()
    assert done().evaluation == first.evaluation
    again = 2 if stage == "target" else 0  # students of a trial are deleted when it is decided
    assert (house.calls, len(house.trained)) == (spent, trainings + again)
    assert contents(house.folder) == before

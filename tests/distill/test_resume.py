"""A run that is started again repeats no stage and no call, and a damaged store says where."""

from pathlib import Path
from typing import Any

import pytest

from arte_edge.console import Reporter
from arte_edge.distill.pipeline import run_pipeline

TABLES: dict[str, Any] = {"data": "original-teacher", "tailor": {"questions": 8}}
STAGES = ("check", "target", "tailor", "tune", "evaluate")


def run(house: Any) -> dict[str, Any]:
    house.by_label = True
    done = run_pipeline(house.config(**TABLES), house.folder, Reporter(quiet=True))
    assert done.folder == house.folder
    return done.evaluation


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for stage in STAGES for path in (folder / stage).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("stage", ["", *STAGES])
def test_a_finished_run_costs_nothing_and_a_stage_that_was_cut_off_is_made_from_the_store(
    house: Any, stage: str
) -> None:
    summary = run(house)
    before, spent, trainings = contents(house.folder), house.calls, len(house.trained)
    assert {name.partition("/")[0] for name in before} == set(STAGES)
    if stage:
        (house.folder / stage / "manifest.json").unlink()
    assert run(house) == summary
    again = 2 if stage == "target" else 0  # students of a trial are deleted when it is decided
    assert (house.calls, len(house.trained)) == (spent, trainings + again)
    assert contents(house.folder) == before

"""A run folder of an earlier version resumes without repeating a stage or a call.

``data/run-0.1`` was written by version 0.1 with the scripted engines of ``conftest.py``.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from arte_edge.distill.run_context import open_folder
from arte_edge.distill.stages.calibrate import calibrate
from arte_edge.distill.stages.check import check
from arte_edge.distill.stages.elicit import elicit
from arte_edge.distill.stages.evaluate import evaluate, summary_table
from arte_edge.distill.stages.prefer import prefer
from arte_edge.distill.stages.tailor import tailor
from arte_edge.errors import ArteError
from arte_edge.models.resolve import LocalModel

OLD = Path(__file__).parent / "data" / "run-0.1"
TABLES: dict[str, Any] = {
    "check": {"examples": 20},
    "elicit": {"questions": 4},
    "calibrate": {"items": 10, "k": 4},
    "tailor": {"questions": 8},
    "evaluate": {"limit": 8, "shots": [0]},
}
STAGES = ("check", "elicit", "calibrate", "prefer", "tailor", "evaluate")


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for stage in STAGES for path in (folder / stage).iterdir()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def resume(house: Any) -> dict[str, Any]:
    """Run every stage that needs no training; return the evaluation's summary."""
    tuned = LocalModel("scripted-student tuned", "sha256 of tuned", Path("t.gguf"), None, "F16")
    open_folder(house.config(**TABLES), house.folder, house.task, update=False)
    run = house.run(**TABLES)
    run.engine_with = lambda model, *_: house.teacher if model.name == house.teacher.name else house.student
    check(run, force=True)
    elicit(run)
    calibrate(run)
    prefer(run)
    tailor(run, (Path("adapter"), "adapter sha256"))
    summary: dict[str, Any] = evaluate(run, tuned)
    run.close()
    return summary


def test_finished_stages_are_reused(house: Any) -> None:
    shutil.copytree(OLD, house.folder)
    before = contents(house.folder)
    summary = resume(house)
    assert house.calls == 0
    assert contents(house.folder) == before
    table = summary_table(summary)
    assert [list(column.cells)[-2:] for column in table.columns][1] == ["constrained", "8-shot"]


@pytest.mark.parametrize("stage", ["elicit", "prefer", "tailor"])
def test_a_stage_that_was_cut_off_is_made_from_the_calls_of_the_store(house: Any, stage: str) -> None:
    shutil.copytree(OLD, house.folder)
    before = contents(house.folder)
    (house.folder / stage / "manifest.json").unlink()
    resume(house)
    assert house.calls == 0
    assert contents(house.folder) == before


@pytest.mark.parametrize("damage", ["a field is missing", "another type"])
def test_a_damaged_call_is_made_again_or_named_with_its_line(house: Any, damage: str) -> None:
    shutil.copytree(OLD, house.folder)
    for stage in ("elicit", "prefer"):
        (house.folder / stage / "manifest.json").unlink()
    log = house.folder / "calls.jsonl"
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    for row in rows:
        key = "text" if "text" in row else "logp"
        row |= {key: [["x"]]} if damage == "another type" else {}
        if damage == "a field is missing":
            del row[key]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    if damage == "another type":
        with pytest.raises(ArteError, match=r"calls\.jsonl:1: this line is damaged"):
            resume(house)
    else:
        resume(house)
        assert house.calls > 0

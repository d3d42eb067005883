"""Which engine scores drafts: the fastest where there is much to score, the student's own where a run says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arte_edge.distill import scorer
from arte_edge.distill.scorer import scoring_engine
from arte_edge.models.local import LocalModel
from arte_edge.runtimes.autotune import Way

MUCH = 500


@pytest.fixture
def measured(house: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What was asked for, and the way that is said to be the fastest."""
    monkeypatch.setenv("ARTE_EDGE_PROBE", "1")
    seen: dict[str, Any] = {"way": Way("transformers", "bfloat16"), "asked": [], "opened": []}
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(bytes(2000))

    def quickest(ways: list[Way], opening: Any, work: str, facts: list[object]) -> Way:
        seen["asked"].append((ways, work, facts))
        seen["engine"] = opening(seen["way"])
        return seen["way"]

    def open_local(model: LocalModel, **how: Any) -> Any:
        seen["opened"].append((model.name, how.get("kind"), how.get("floats")))
        return house.student

    monkeypatch.setattr(scorer, "quickest", quickest)
    monkeypatch.setattr(scorer, "open_local", open_local)
    monkeypatch.setattr("arte_edge.distill.run.open_local", open_local)
    monkeypatch.setattr(LocalModel, "checkpoint", lambda self, progress=None: checkpoint)
    return seen


def test_where_nothing_may_be_measured_it_is_the_students_own(
    house: Any, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARTE_EDGE_PROBE", "0")
    run = house.run()
    assert scoring_engine(run, MUCH) is run.engine(run.config.student)
    assert not measured["asked"]
    run.close()


def test_much_is_scored_by_the_fastest_engine_in_its_floats(house: Any, measured: dict[str, Any]) -> None:
    run = house.run()
    assert scoring_engine(run, MUCH) is house.student
    assert measured["opened"][-1] == ("scripted-student", "transformers", "bfloat16")
    ways, work, facts = measured["asked"][0]
    assert ways[0] == Way("llamacpp") and Way("transformers", "float32") in ways
    assert work == "choose" and f"sha256 of {run.config.student.model}" in facts
    run.close()


def test_where_llama_cpp_is_the_fastest_it_is_the_students_own(house: Any, measured: dict[str, Any]) -> None:
    measured["way"] = Way("llamacpp")
    run = house.run()
    assert scoring_engine(run, MUCH) is run.engine(run.config.student)
    run.close()


def test_written_answers_are_measured_by_writing(house: Any, measured: dict[str, Any]) -> None:
    run = house.run(prefer={"score": "accuracy"})
    scoring_engine(run, MUCH)
    assert measured["asked"][0][1] == "write"
    run.close()


@pytest.mark.parametrize(
    ("tables", "n"),
    [
        ({}, MUCH - 1),
        ({"prefer": {"engine": "student"}}, MUCH),
        ({"student": {"model": "scripted-student", "engine": "llamacpp"}}, MUCH),
    ],
)
def test_little_to_score_or_a_run_that_says_so_keeps_the_students_own_engine(
    house: Any, measured: dict[str, Any], tables: dict[str, Any], n: int
) -> None:
    run = house.run(**tables)
    assert scoring_engine(run, n) is run.engine(run.config.student)
    assert not measured["asked"]
    run.close()

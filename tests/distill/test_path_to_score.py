"""From the command to one preference score: at most 15 files, and the ones that docs/architecture.md names."""

from pathlib import Path
from typing import Any

import pytest
from tiny import Patch
from tracing import documented, files_run

from arte_edge.cli.main import main
from arte_edge.models.resolve import LocalModel
from arte_edge.runtimes.llamacpp.engine import LlamaCppEngine

LIMIT = 15


class Scored(BaseException):
    """The scores are there; the rest of the run is not needed."""


def test_one_preference_score(house: Any, bench_gguf: Path, monkeypatch: Patch) -> None:
    from arte_edge.distill.stages import prefer

    engines = {house.teacher.name: house.teacher, house.student.name: LlamaCppEngine(bench_gguf, sha256="x")}

    def opened(model: LocalModel, **_: Any) -> Any:
        return engines[model.name]

    score_drafts, found = prefer.score_drafts, set[str]()

    def traced(*args: Any, **kwargs: Any) -> Any:
        with files_run(found):
            score_drafts(*args, **kwargs)
        raise Scored

    monkeypatch.setattr("arte_edge.distill.run_context.open_local", opened)
    monkeypatch.setattr(prefer, "score_drafts", traced)
    names = ["--task", "parity", "--teacher", house.teacher.name, "--student", house.student.name]
    small = [
        "elicit.questions=4",
        "calibrate.k=2",
        "calibrate.items=10",
        "calibrate.shots=[0]",
        "check.examples=20",
        "check.own_labels=false",
        "tune.target=answer",
    ]
    where = ["--runs", str(house.folder.parent), "--name", "run", "--force"]
    with pytest.raises(Scored):
        main(["distill", *names, *where, *(word for one in small for word in ("--set", one))])
    assert len(found) <= LIMIT, sorted(found)
    assert found == documented("One preference score")

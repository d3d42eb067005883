"""A run folder that the version before wrote resumes: what it computed is not computed again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from arte_edge.distill.config import build, load_toml
from arte_edge.distill.run_context import open_folder
from arte_edge.distill.stages.calibrate import calibrate
from arte_edge.distill.stages.elicit import elicit
from arte_edge.distill.stages.prefer import prefer

OLD = Path(__file__).resolve().parents[1] / "data" / "version_1" / "run"


def test_it_resumes(house: Any) -> None:
    shutil.copytree(OLD, house.folder)
    config = build("run.toml", load_toml(house.folder / "run.toml"))
    open_folder(config, house.folder, house.task, update=False)
    run = house.run(name="old", calibrate={"items": 16, "k": 8})
    assert run.config == config
    for stage in (elicit, calibrate, prefer):
        stage(run)
    assert house.calls == 0 and run.calls.made == 0

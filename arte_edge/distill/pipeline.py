"""The pipeline: the six steps in order, between a check before and an evaluation after."""

from __future__ import annotations

from pathlib import Path

from arte_edge.distill.calibrate import calibrate
from arte_edge.distill.check import check
from arte_edge.distill.config import RunConfig
from arte_edge.distill.elicit import elicit
from arte_edge.distill.prefer import prefer
from arte_edge.distill.progress import Reporter
from arte_edge.distill.run import Run, open_folder
from arte_edge.tasks.load import load_task

__all__ = ["run_pipeline"]


def run_pipeline(
    config: RunConfig, folder: Path, *, anyway: bool, update: bool, dry_run: bool, as_json: bool
) -> None:
    """Run every stage of `config` in `folder`; stages that are done from the same inputs are kept."""
    task = load_task(config.task.ref, bbh=Path(config.task.bbh) if config.task.bbh else None)
    open_folder(config, folder, task, update=update)
    reporter = Reporter(folder / "events.jsonl", as_json=as_json)
    run = Run(config, task, folder, reporter)
    try:
        check(run, anyway=anyway)
        elicit(run)
        calibrate(run)
        prefer(run)
    finally:
        run.close()

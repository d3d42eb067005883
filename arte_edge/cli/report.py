"""``arte-edge report``: the run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arte_edge.console import emit_json, out

__all__ = ["report"]


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name under runs/.")],
    output: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Where to; RUN/report.html unless given."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Path and what is missing, on stdout.")] = False,
) -> None:
    """Write a run's story as one HTML page: charts inside, nothing fetched, readable anywhere.

    It covers what is there: a run that is not finished, or was not exported or measured
    yet, has a report too, which says what is missing.
    """
    from arte_edge.publish.report import write_report
    from arte_edge.publish.report_data import read_story
    from arte_edge.publish.where import find_run

    story = read_story(run)
    path = write_report(story, output or find_run(run) / "report.html")
    if as_json:
        emit_json({"report": str(path), "missing": story.missing})
        return
    for line in story.missing:
        out.print(f"not in it: {line}", markup=False, soft_wrap=True)
    out.print(f"The report: {path}", markup=False, soft_wrap=True)

"""``arte-edge study``: arms on tasks, students and seeds, as one table with paired intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arte_edge.cli import interrupt
from arte_edge.errors import StoppedEarly


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="Tasks, students, seeds and arms.")],
    runs: Annotated[Path, typer.Option(help="Parent folder of the study's folder.")] = Path("runs"),
    update: Annotated[
        bool,
        typer.Option("--update", help="Change the settings of existing runs; finished calls are reused."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line for each run that ends, and the table, as JSON.")
    ] = False,
) -> None:
    """Compare arms, one run each, on tasks, students and seeds.

    The runs share their calls; nothing is generated twice. Re-run the same command to resume. The study's folder holds
    study.json, study.html and the run folders.
    """
    from arte_edge import api
    from arte_edge.console import Reporter, emit_json, out

    interrupt.resumes()
    done = api.study(file, runs=runs, update=update, reporter=Reporter(as_json=as_json))
    if as_json:
        emit_json({"event": "done", "study": str(done.folder), **done.as_dict()})
    else:
        for title, table in done.tables:
            out.print(title, style="bold", markup=False, soft_wrap=True)
            out.print(table)
        for line in [*done.lines, f"Folder: {done.folder}"]:
            out.print(line, markup=False, soft_wrap=True)
    if done.stopped:
        raise StoppedEarly(
            f"{len(done.stopped)} of {len(done.runs)} runs stopped early", "The table is without them."
        )

"""``arte-edge report``: the run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arte_edge.console import emit_json
from arte_edge.console import out as stdout

__all__ = ["report"]


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name under runs/.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Output file; default: RUN/report.html."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: the path and what is missing.")
    ] = False,
) -> None:
    """Write a report on a run as one HTML page.

    Charts are inline, nothing is loaded from the network. A run that is not finished, or was not exported or
    measured yet, has a report too, which lists what is missing.
    """
    from arte_edge import api

    page = api.report(run, out=out)
    if as_json:
        emit_json({"report": str(page.path), "missing": list(page.missing)})
        return
    for line in page.missing:
        stdout.print(f"not included: {line}", soft_wrap=True)
    stdout.print(f"wrote {page.path}", soft_wrap=True)

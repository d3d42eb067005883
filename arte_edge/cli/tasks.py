"""``arte-edge tasks``: list, show, check and start task folders."""

from __future__ import annotations

import typer

__all__ = ["app"]

app = typer.Typer(help="Tasks: what a student learns, with its data.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Tasks: what a student learns, with its data."""

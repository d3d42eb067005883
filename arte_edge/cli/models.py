"""``arte-edge models``: the models that can be named, fetched and converted."""

from __future__ import annotations

import typer

__all__ = ["app"]

app = typer.Typer(help="List, fetch, find and check models.", no_args_is_help=True)


@app.command("ls")
def ls() -> None:
    """List the models of the registry."""

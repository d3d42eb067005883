"""The ``arte-edge`` command: registers the verbs, catches `ArteError`, sets the exit code.

Verbs import heavy modules only when they run, so that ``--help`` is fast on a Raspberry Pi too.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from arte_edge import __version__
from arte_edge.cli import (
    ask,
    bench,
    card,
    compare,
    devices,
    distill,
    env,
    export,
    models,
    presets,
    push,
    recommend,
    report,
    tasks,
    verify,
)
from arte_edge.console import err
from arte_edge.errors import ArteError

__all__ = ["app", "main"]

app = typer.Typer(
    name="arte-edge",
    help="Make a small language model good at your task, and prove it on your device.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(distill.distill)
app.command()(ask.ask)
app.command()(export.export)
app.command()(verify.verify)
app.command()(bench.bench)
app.command()(compare.compare)
app.command()(recommend.recommend)
app.command()(report.report)
app.command()(card.card)
app.command()(push.push)
app.command()(env.env)
for verb in (presets.ls, presets.show, presets.copy, presets.check):
    app.command()(verb)
app.add_typer(tasks.app, name="tasks")
app.add_typer(models.app, name="models")
app.add_typer(devices.app, name="devices")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"arte-edge {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """Options before the verb."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code (see `arte_edge.errors`)."""
    args = sys.argv[1:] if argv is None else argv
    try:
        # Standalone mode: Typer prints its own usage errors, whose classes differ between its releases.
        app(args=args, prog_name="arte-edge")
    except ArteError as error:
        if "--debug" in args:
            raise
        err.print(f"[bold red]error:[/] {escape(error.message)}", markup=True, soft_wrap=True)
        if error.hint:
            err.print(error.hint, markup=False, soft_wrap=True)
        return error.exit_code
    except SystemExit as done:
        if done.code == 130:  # Typer's code for Ctrl-C
            err.print("Interrupted. Run the same command again to resume.", markup=False)
            return 4
        return done.code if isinstance(done.code, int) else 0
    return 0

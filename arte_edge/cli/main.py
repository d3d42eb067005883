"""The ``arte-edge`` command: registers the verbs, catches `ArteError`, sets the exit code.

Verbs import heavy modules only when they run, so that ``--help`` is fast on a Raspberry Pi too.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from arte_edge import __version__
from arte_edge.cache import DiskFull, is_disk_full
from arte_edge.cli import ask, bench, devices, distill, env, export, interrupt, models, presets, publish, tasks
from arte_edge.console import err, heartbeat, tolerate_any_encoding
from arte_edge.errors import ArteError, InputError

app = typer.Typer(
    name="arte-edge",
    help="Make a small language model good at your task, and prove it on your device.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(distill.distill)
app.command()(distill.study)
app.command()(ask.ask)
app.command()(ask.chat)
app.command()(ask.serve)
app.command()(export.export)
app.command()(export.verify)
app.command()(bench.bench)
app.command()(bench.compare)
app.command()(publish.recommend)
app.command()(publish.report)
app.command()(publish.card)
app.command()(publish.push)
app.command()(env.env)
_WAITING = ("chat", "serve")  # for their user
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
    if argv is None:
        interrupt.install()
    tolerate_any_encoding()
    try:
        if any("\0" in word for word in args):
            raise InputError("An argument holds a null byte", "Give it without.")
        verb = next((word for word in args if not word.startswith("-")), "arte-edge")
        with nullcontext() if verb in _WAITING else heartbeat(verb):
            # Standalone mode: Typer prints its own usage errors, whose classes differ between its releases.
            app(args=args, prog_name="arte-edge")
    except SystemExit as done:
        if done.code == 130:  # Typer's code for a KeyboardInterrupt
            sys.stdout.flush()
            interrupt.end()
        return done.code if isinstance(done.code, int) else 0
    except Exception as error:
        if "--debug" in args:
            raise
        shown = _explained(error)
        err.print(Text.assemble(("error:", "bold red"), f" {shown.message}"), soft_wrap=True)
        if shown.hint:
            err.print(shown.hint, soft_wrap=True)
        return shown.exit_code
    return 0


def _explained(error: Exception) -> ArteError:
    """Return what the user is told about an error; only ``--debug`` shows a traceback."""
    if isinstance(error, ArteError):
        return error
    if isinstance(error, OSError) and is_disk_full(error):  # a failed write does not name its file
        return DiskFull(Path(str(error.filename or Path.cwd())), "what this command writes")
    if isinstance(error, OSError) and error.filename is not None:
        return InputError(f"{error.filename}: {error.strerror}")
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    return ArteError(text, "A fault of arte-edge: please report it with what `arte-edge --debug …` prints.")

"""The command as a whole: every verb explains itself, and a mistyped one is the user's error (exit 2)."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from arte_edge import __version__
from arte_edge.cli.main import app

ROOT = Path(__file__).resolve().parents[1]


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield ``(words, command)`` for `command` and everything below it."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


EVERYTHING = list(commands(typer.main.get_command(app)))
VERBS = [(words, command) for words, command in EVERYTHING if not hasattr(command, "commands")]


def arte_edge(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "arte_edge", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def label(value: Any) -> str | None:
    return " ".join(value) or "arte-edge" if isinstance(value, tuple) else ""


def test_the_command_has_verbs() -> None:
    assert {("tasks", "ls"), ("models", "ls")} <= {words for words, _ in VERBS}


@pytest.mark.parametrize(("words", "command"), EVERYTHING, ids=label)
def test_every_command_and_every_option_has_help(words: tuple[str, ...], command: Any) -> None:
    assert command.help
    assert [param.name for param in command.params if not getattr(param, "help", None)] == []


@pytest.mark.parametrize(("words", "command"), VERBS, ids=label)
def test_every_verb_can_answer_in_json(words: tuple[str, ...], command: Any) -> None:
    assert "--json" in [option for param in command.params for option in param.opts]


def test_help_goes_to_stdout() -> None:
    done = arte_edge("--help")
    assert done.returncode == 0
    assert "Usage: arte-edge" in done.stdout
    assert done.stderr == ""


def test_version_is_the_package_version() -> None:
    assert arte_edge("--version").stdout == f"arte-edge {__version__}\n"


MISTYPED = [["distil"], ["tasks", "lss"], ["tasks", "ls", "--jsn"], ["--debg"]]


@pytest.mark.parametrize("words", MISTYPED, ids=" ".join)
def test_a_mistyped_command_is_exit_2_without_a_traceback(words: list[str]) -> None:
    done = arte_edge(*words)
    assert done.returncode == 2
    assert words[-1] in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""

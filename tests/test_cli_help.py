"""The command as a whole: every verb explains itself, and a mistyped one is the user's error (exit 2)."""

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from tiny import Capture

from arte_edge import __version__
from arte_edge.cli.main import app, main


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield ``(words, command)`` for `command` and everything below it."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


EVERYTHING = list(commands(typer.main.get_command(app)))
VERBS = [(words, command) for words, command in EVERYTHING if not hasattr(command, "commands")]


def label(value: Any) -> str | None:
    return " ".join(value) or "arte-edge" if isinstance(value, tuple) else ""


@pytest.mark.parametrize(("words", "command"), EVERYTHING, ids=label)
def test_every_command_and_every_option_has_help(words: tuple[str, ...], command: Any) -> None:
    assert command.help
    assert [param.name for param in command.params if not getattr(param, "help", None)] == []


@pytest.mark.parametrize(("words", "command"), EVERYTHING[1:], ids=label)
def test_the_first_sentence_fits_into_the_list_of_commands(words: tuple[str, ...], command: Any) -> None:
    assert not command.get_short_help_str(limit=58).endswith("...")


@pytest.mark.parametrize(("words", "command"), VERBS, ids=label)
def test_every_verb_can_answer_in_json(words: tuple[str, ...], command: Any) -> None:
    assert "--json" in [option for param in command.params for option in param.opts]


def test_help_and_version_go_to_stdout(capsys: Capture) -> None:
    assert {("tasks", "ls"), ("models", "ls")} <= {words for words, _ in VERBS}
    assert main(["--help"]) == 0
    printed = capsys.readouterr()
    assert "Usage: arte-edge" in printed.out and printed.err == ""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"arte-edge {__version__}\n"

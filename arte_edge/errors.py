"""The one family of errors that reach a user, and the exit code each one ends with.

    ArteError            1  the run failed
    ├── InputError       2  your input: a key, a file, a name, an unreadable model
    ├── GateError        3  a fidelity gate failed: the exported file is not the student
    ├── StoppedEarly     4  stopped on purpose; re-run the same command to resume
    └── EngineError      1  a model runtime or a server failed

A message says what is wrong and where (``run.toml: align.learning_rat``); the hint says what to do about it.
`arte_edge.cli` catches `ArteError` once and prints both; a traceback appears only with ``--debug``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class ArteError(Exception):
    """What is wrong and what to do about it, in two plain sentences."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class InputError(ArteError):
    """Something the user gave us cannot be used as it is."""

    exit_code = 2


class GateError(ArteError):
    """An exported file differs from the student by more than its threshold."""

    exit_code = 3


class StoppedEarly(ArteError):
    """A budget or a check ended the run; nothing is lost and it can be resumed."""

    exit_code = 4


class EngineError(ArteError):
    """A runtime or a server failed in a way that retrying did not fix."""


@contextmanager
def reading(path: Path, hint: str = "") -> Iterator[None]:
    """Name `path` where its content is not what the code inside expects: a missing key, a value of another type.

    Raises InputError: in place of the Python error that the content caused.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise InputError(f"{path}: damaged, or of another kind than its name says: {what}", hint) from error


def first_line(error: object) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the nearest of `known`, or lists a few of them."""
    options = sorted(known)
    if close := get_close_matches(name, options, n=1, cutoff=0.5):
        return f"Did you mean '{close[0]}'?"
    if not options:
        return ""
    shown = ", ".join(options[:12]) + (", …" if len(options) > 12 else "")
    return f"Known: {shown}."

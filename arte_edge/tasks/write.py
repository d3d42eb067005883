"""Writes task folders: a skeleton to fill in, or one made of a labelled table.

The comments that a person needs while filling it in go into the file itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tomlkit
from tomlkit.items import Array, String

from arte_edge.errors import InputError
from arte_edge.tasks.rows import write_rows
from arte_edge.tasks.task import SPLITS, Answer, Example, Task

__all__ = ["check_vacant", "set_techniques", "write_skeleton", "write_task"]

_ABOUT_DESCRIPTION = """\
Two or three sentences for the teacher and the student: what goes in, what comes out, the rules."""
_ABOUT_TECHNIQUES = """\
Four ways of thinking about an input, as instructions; ask for one to three short sentences.
A teacher can propose them: arte-edge tasks new DIR --teacher MODEL"""
_ABOUT_ANSWER = """\
kind: choice, boolean, number or text. A choice has fixed labels (choices = ["yes", "no"]),
or none if every input lists its options in lines like "(A) circle"."""
_ABOUT_SPLITS = """\
Beside this file: seed.jsonl (shown to the teacher; 40 is good), validation.jsonl (chooses questions and
rationales; at least 20, better 100) and test.jsonl (read by the final evaluation alone), one row a line:
{"input": "...", "target": "..."}
Then: arte-edge tasks check DIR"""


def write_skeleton(folder: Path, name: str, description: str = "") -> None:
    """Write a task folder to fill in; `arte-edge tasks check` says what is still to be done.

    Raises:
        InputError: `folder` exists and is not empty.
    """
    _write(folder, name, description, Answer(kind="text"), (), dict.fromkeys(SPLITS, ()))


def write_task(folder: Path, task: Task) -> None:
    """Write `task`, as made of a labelled table, as a task folder: its splits are then fixed files.

    Raises:
        InputError: `folder` exists and is not empty.
    """
    splits = {"seed": task.seed, "validation": task.validation, "test": task.load_test()}
    _write(folder, task.name, task.description, task.answer, task.techniques, splits)


def check_vacant(folder: Path) -> None:
    """Raise unless `folder` can be written without touching anything that is there.

    Raises:
        InputError: it exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already", "Name a new folder; nothing is ever overwritten.")


def _write(
    folder: Path,
    name: str,
    description: str,
    answer: Answer,
    techniques: Sequence[str],
    splits: dict[str, tuple[Example, ...]],
) -> None:
    check_vacant(folder)
    document = tomlkit.document()
    _comment(document, _ABOUT_SPLITS)
    document.add(tomlkit.nl())
    document["name"] = name
    document.add(tomlkit.nl())
    _comment(document, _ABOUT_DESCRIPTION)
    document["description"] = _text(description)
    document.add(tomlkit.nl())
    _comment(document, _ABOUT_TECHNIQUES)
    document["techniques"] = _array(techniques)
    document.add(tomlkit.nl())
    _comment(document, _ABOUT_ANSWER)
    table = tomlkit.table()
    table["kind"] = answer.kind
    if answer.choices:
        table["choices"] = list(answer.choices)
    document["answer"] = table
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.toml").write_text(tomlkit.dumps(document), encoding="utf-8", newline="\n")
    for split, rows in splits.items():
        write_rows(folder / f"{split}.jsonl", rows)


def set_techniques(folder: Path, techniques: Sequence[str]) -> None:
    """Replace the technique prompts of the task in `folder`; comments and other keys stay as they are."""
    path = folder / "task.toml"
    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    document["techniques"] = _array(techniques)
    path.write_text(tomlkit.dumps(document), encoding="utf-8", newline="\n")


def _comment(document: tomlkit.TOMLDocument, text: str) -> None:
    for line in text.split("\n"):
        document.add(tomlkit.comment(line))


def _text(text: str) -> String:
    return tomlkit.string(f"{text}\n" if text else "", multiline=bool(text))


def _array(texts: Sequence[str]) -> Array:
    array = tomlkit.array()
    array.extend(texts)
    return array.multiline(bool(texts))

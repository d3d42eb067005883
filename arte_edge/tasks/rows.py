"""Reads and writes the rows of a split: JSON lines of ``{"input": ..., "target": ...}``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from arte_edge.errors import nearest
from arte_edge.tasks.answers import canonical
from arte_edge.tasks.problems import Problem
from arte_edge.tasks.task import Answer, Example

__all__ = ["Row", "check_target", "parse_jsonl", "read_rows", "write_rows"]

_COLUMNS = ("input", "target")


@dataclass(frozen=True)
class Row:
    """An example and the place it was read from, ``file:line``."""

    where: str
    example: Example


def read_rows(path: Path, answer: Answer) -> tuple[list[Row], list[Problem]]:
    """Read a split: its good rows, targets in canonical form, and what is wrong with the others."""
    rows: list[Row] = []
    values, problems = parse_jsonl(path)
    seen: dict[str, str] = {}
    for where, value in values:
        if bad := _check_columns(where, value):
            problems.append(bad)
            continue
        text, target = str(value["input"]), str(value["target"])
        checked = check_target(where, text, target, answer)
        if isinstance(checked, Problem):
            problems.append(checked)
            continue
        row = Row(where, Example(text, checked))
        if first := seen.get(row.example.key):
            problems.append(Problem(where, f"the same input as {first}", "Keep one of the two rows."))
            continue
        seen[row.example.key] = where
        rows.append(row)
    return rows, problems


def parse_jsonl(path: Path) -> tuple[list[tuple[str, dict[str, object]]], list[Problem]]:
    """Read the JSON objects of `path` with their ``file:line``; blank lines are skipped."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return [], [Problem(path.name, "this file is missing", f"It belongs in {path.parent}.")]
    except (OSError, UnicodeDecodeError) as error:
        return [], [Problem(path.name, f"cannot be read as UTF-8 text ({error})")]
    values: list[tuple[str, dict[str, object]]] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(Problem(where, f"not JSON ({error})", "One object a line, in double quotes."))
            continue
        if isinstance(value, dict):
            values.append((where, value))
        else:
            problems.append(Problem(where, 'not an object like {"input": "...", "target": "..."}'))
    return values, problems


def _check_columns(where: str, value: dict[str, object]) -> Problem | None:
    for key in _COLUMNS:
        if key not in value:
            return Problem(where, f"no '{key}'", f"It has: {', '.join(value) or 'nothing'}.")
        if not isinstance(value[key], str) or not str(value[key]).strip():
            return Problem(where, f"'{key}' must be a string that is not empty")
    for key in value:
        if key not in _COLUMNS:
            return Problem(where, f"unknown key '{key}'", nearest(key, _COLUMNS))
    return None


def check_target(where: str, text: str, target: str, answer: Answer) -> str | Problem:
    """Return the canonical form of `target`, or why it cannot be the answer to the input `text`."""
    form = canonical(target, answer)
    if form is None:
        return Problem(where, f"target {target!r} is not {_expected(answer)}", _target_hint(target, answer))
    if answer.letters:
        options = answer.options(text)
        if not options:
            return Problem(where, "the input lists no options", 'List them in lines like "(A) circle".')
        if form not in options:
            return Problem(where, f"target {form} is not among the options {options[0]} to {options[-1]}")
    return form


def _expected(answer: Answer) -> str:
    if answer.choices:
        return f"one of {', '.join(answer.choices)}"
    names = {"choice": "the letter of an option", "boolean": "True or False", "number": "one number"}
    return names.get(answer.kind, "a text with a letter or digit in it")


def _target_hint(target: str, answer: Answer) -> str:
    if answer.choices:
        return nearest(target, answer.choices)
    return "Correct the target, or the answer kind in task.toml."


def write_rows(path: Path, rows: Iterable[Example]) -> None:
    """Write a split; the same rows give the same bytes on every system."""
    lines = [json.dumps({"input": r.input, "target": r.target}, ensure_ascii=False) + "\n" for r in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")

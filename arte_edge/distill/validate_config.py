"""Validate a run file before any model is downloaded: `arte-edge check`. All problems are reported at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arte_edge.distill.config import RunConfig, problems_of
from arte_edge.errors import ArteError
from arte_edge.gguf.reader import read_model_header
from arte_edge.models import registry
from arte_edge.models.resolve import resolve
from arte_edge.runtimes.loader import is_server
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Task

__all__ = ["find_problems"]

Problem = tuple[str, str]


def find_problems(tables: Mapping[str, Any]) -> list[Problem]:
    """Return every problem of a run file's tables as (message, hint) pairs.

    Task and models are checked even if other keys are wrong.
    """
    return [
        *problems_of(tables),
        *_task_problems(tables),
        *(problem for key, ref in _models(tables) for problem in _model_problems(key, ref)),
        *_alignment_problems(tables),
    ]


def _value(tables: Mapping[str, Any], section: str, key: str) -> Any:
    """Return a key's value, or its default if the file does not set it."""
    table = tables.get(section)
    if isinstance(table, Mapping) and key in table:
        return table[key]
    return getattr(getattr(RunConfig(), section), key)


def _task_problems(tables: Mapping[str, Any]) -> Iterator[Problem]:
    ref, bbh = _value(tables, "task", "ref"), _value(tables, "task", "bbh")
    if not isinstance(ref, str) or not isinstance(bbh, str | None):
        return  # the wrong type is reported already
    try:
        task = load_task(ref, bbh=Path(bbh) if bbh else None)
    except ArteError as error:
        yield f"task.ref: {error.message}", error.hint
        return
    yield from _size_problems(tables, task)


def _size_problems(tables: Mapping[str, Any], task: Task) -> Iterator[Problem]:
    shown = _value(tables, "elicit", "shown")
    if isinstance(shown, int) and shown > len(task.seed):
        yield (
            f"elicit.shown: {shown} seeds per prompt, but the task '{task.name}' has {len(task.seed)}",
            "Lower elicit.shown, or add seeds.",
        )


def _models(tables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for section in ("teacher", "student"):
        table = tables.get(section)
        if isinstance(table, Mapping) and "model" not in table:
            continue  # reported as a missing key
        yield f"{section}.model", _value(tables, section, "model")
    extra = _value(tables, "calibrate", "models")
    for ref in extra if isinstance(extra, list | tuple) else ():
        yield "calibrate.models", ref


def _model_problems(key: str, ref: Any) -> Iterator[Problem]:
    if not isinstance(ref, str):
        return
    try:
        _look_up(ref)
    except ArteError as error:
        yield f"{key}: {error.message}", error.hint


def _look_up(ref: str) -> None:
    """Raise if `ref` names no model. Downloads nothing and hashes no large file."""
    path = Path(ref).expanduser()
    if is_server(ref):
        from arte_edge.runtimes.openai.engine import parse_ref

        parse_ref(ref)
    elif path.is_file():
        read_model_header(path)
    elif path.is_dir() or ref.endswith(".gguf") or ref.startswith((".", "/", "~")):
        resolve(ref, offline=True)
    elif "/" not in ref:  # else a Hub id, and only the Hub knows
        registry.entry(ref)


def _alignment_problems(tables: Mapping[str, Any]) -> Iterator[Problem]:
    teacher, student = _value(tables, "teacher", "model"), _value(tables, "student", "model")
    if isinstance(teacher, str) and is_server(teacher) and tables.get("data") != "original-teacher":
        yield (
            f"teacher.model: {teacher} is a server, and alignment needs the teacher's weights",
            'Set data = "original-teacher", or use a local teacher.',
        )
    if isinstance(student, str) and is_server(student):
        yield (
            f"student.model: {student} is a server, but the student is trained locally",
            "Use a local model.",
        )

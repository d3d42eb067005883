"""Prompts for comparing logits: a task's held-out examples, a user's file, or built-in dialogues.

A task's prompts are rendered as for the student, followed by the correct answer. The built-in texts were
written for this file, so they are in no training set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from arte_edge.distill.prompts import ANSWER_CLOSE, ANSWER_PREFILL, student_messages
from arte_edge.errors import InputError
from arte_edge.files import json_loads
from arte_edge.runtimes.prompt_render import Message
from arte_edge.tasks.task import Task

__all__ = ["Renders", "built_in_prompts", "plain_text", "prompts_for", "prompts_from_file", "task_prompts"]

_TASK_PROMPTS = 48


class Renders(Protocol):
    """Anything with a chat template; `render` returns None without one."""

    def render(self, messages: Sequence[Message]) -> str | None: ...


_DIALOGUES: list[dict[str, str]] = json_loads(Path(__file__).with_name("dialogues.json").read_text("utf-8"))


def built_in_prompts(reference: Renders) -> list[str]:
    """Return sixteen short dialogues with answers in the reference's own format: about 1,500 tokens."""
    return [
        _rendered(reference, [{"role": "user", "content": dialogue["question"]}]) + dialogue["answer"]
        for dialogue in _DIALOGUES
    ]


def task_prompts(reference: Renders, task: Task, limit: int = _TASK_PROMPTS) -> list[str]:
    """Return the prompts of up to `limit` validation examples, each with its correct answer.

    Raises InputError: the task has no validation examples.
    """
    if not task.validation:
        raise InputError(f"Task '{task.name}' has no validation examples", "Label some in validation.jsonl.")
    return [
        _rendered(reference, student_messages(task, example.input))
        + ANSWER_PREFILL
        + example.target
        + ANSWER_CLOSE
        for example in task.validation[:limit]
    ]


def _rendered(model: Renders, messages: Sequence[Message]) -> str:
    text = model.render(messages)
    return plain_text(messages) if text is None else text


def plain_text(messages: Sequence[Message]) -> str:
    """Return the prompt for a model without a chat template, as `arte_edge.runtimes.prompt_render` renders it."""
    return "\n\n".join(message["content"] for message in messages) + "\n"


def prompts_from_file(path: Path) -> list[str]:
    """Return the rendered prompts in a file: ``prompt``, ``text`` or ``input`` of ``.jsonl`` rows, else lines.

    Raises InputError: the file cannot be read, or is empty.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}", "Give a UTF-8 text file.") from error
    prompts = [_row(path, n, line) for n, line in enumerate(lines, 1)] if path.suffix == ".jsonl" else lines
    if not prompts:
        raise InputError(f"{path}: contains no prompts", "Write one prompt a line.")
    return prompts


def _row(path: Path, number: int, line: str) -> str:
    try:
        row = json_loads(line)
    except ValueError as error:
        raise InputError(f"{path}:{number}: not JSON: {error}", "Write one JSON object a line.") from error
    texts = (
        [row[key] for key in ("prompt", "text", "input") if key in row] if isinstance(row, dict) else [row]
    )
    if not texts or not isinstance(texts[0], str):
        raise InputError(
            f"{path}:{number}: no text", "A row needs `prompt`, `text` or `input`, or is a string."
        )
    return texts[0]


def prompts_for(model: Renders, task: Task | None, file: Path | None) -> list[str]:
    """Return the prompts of a user's file if given, else of the task, else the built-in ones."""
    if file is not None:
        return prompts_from_file(file)
    return built_in_prompts(model) if task is None else task_prompts(model, task)

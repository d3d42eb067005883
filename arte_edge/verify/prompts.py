"""Prompts for comparing logits: a task's held-out examples, a user's file, or built-in dialogues.

A task's prompts are rendered as for the student, followed by the correct answer as the student writes it. The built-in
texts were written for this file, so they are in no training set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from arte_edge.asking.form import Asking, held_form, plain_template
from arte_edge.errors import InputError
from arte_edge.files import json_loads
from arte_edge.runtimes.prompt_render import Message, Templated, render
from arte_edge.tasks.task import Task

_TASK_PROMPTS = 48


_DIALOGUES: list[dict[str, str]] = json_loads(Path(__file__).with_name("dialogues.json").read_text("utf-8"))


class Prompted(Templated, Protocol):
    """A model with its own chat template, or without one; `render` as in `arte_edge.runtimes.protocol.Runtime`."""

    def render(self, messages: Sequence[Message]) -> str | None: ...


def built_in_prompts(reference: Templated) -> list[str]:
    """Return sixteen short dialogues with answers in the reference's own format: about 1,500 tokens."""
    return [
        rendered(reference, [{"role": "user", "content": dialogue["question"]}]) + dialogue["answer"]
        for dialogue in _DIALOGUES
    ]


def task_prompts(reference: Prompted, task: Task, limit: int = _TASK_PROMPTS) -> list[str]:
    """Return the prompts of up to `limit` validation examples, each with its correct answer.

    Raises InputError: the task has no validation examples.
    """
    if not task.validation:
        raise InputError(f"Task '{task.name}' has no validation examples", "Label some in validation.jsonl.")
    form = held_form(reference, task)
    asking = Asking.of(task, form or "answer", len)  # of its budget nothing is used
    front = [] if form else [{"role": "system", "content": asking.instruction}]
    return [
        rendered(reference, [*front, *asking.messages(example.input)]) + asking.completion(example.target)
        for example in task.validation[:limit]
    ]


def rendered(model: Templated, messages: Sequence[Message]) -> str:
    """Return the prompt of a conversation; without a chat template a model gets `plain_template`'s.

    Raises InputError: the template does not render.
    """
    if model.chat_template is None:
        model = _Plain(plain_template(model.special_tokens), model.special_tokens)
    return render(model, messages)


@dataclass(frozen=True)
class _Plain:
    chat_template: str
    special_tokens: dict[str, str]


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
    texts = [row[key] for key in ("prompt", "text", "input") if key in row] if isinstance(row, dict) else [row]
    if not texts or not isinstance(texts[0], str):
        raise InputError(f"{path}:{number}: no text", "A row needs `prompt`, `text` or `input`, or is a string.")
    return texts[0]


def prompts_for(model: Prompted, task: Task | None, file: Path | None) -> list[str]:
    """Return the prompts of a user's file if given, else of the task, else the built-in ones."""
    if file is not None:
        return prompts_from_file(file)
    return built_in_prompts(model) if task is None else task_prompts(model, task)

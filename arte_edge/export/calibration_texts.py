"""The two sets of texts that an export needs, which must not be mixed up.

*Training texts* weigh the importance matrix: what the student was tuned on, rendered as
it was. *Held-out prompts* are what the gate compares on: the task's validation
examples, which no training saw. The test split is read by neither.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arte_edge.distill.prompts import STEPS, student_messages, tagged
from arte_edge.errors import InputError
from arte_edge.export.chat import Chat
from arte_edge.runtimes.prompt_render import Message
from arte_edge.store import read_jsonl
from arte_edge.tasks.task import Task
from arte_edge.verify.prompts import built_in_prompts, task_prompts

__all__ = ["held_out", "neutral", "seed_texts", "training_texts"]


@dataclass(frozen=True)
class _Words:
    """The one thing that prompts ask of an opened model, without opening it."""

    chat: Chat
    plain: bool

    def render(self, messages: Sequence[Message]) -> str | None:
        has_template = self.chat.chat_template is not None and not self.plain
        return self.chat.render(messages) if has_template else None


def held_out(task: Task, chat: Chat, n: int, *, plain: bool = False) -> tuple[str, ...]:
    """Return up to `n` validation examples of `task` with their answers, rendered as the student is asked.

    Raises:
        InputError: the task has none.
    """
    return tuple(task_prompts(_Words(chat, plain), task, n))


def neutral(chat: Chat) -> tuple[str, ...]:
    """Return the gate's own short dialogues, for a model without a task."""
    return tuple(built_in_prompts(_Words(chat, False)))


def training_texts(rows: Path, n: int) -> tuple[str, ...]:
    """Return up to `n` of a run's training texts, prompt and completion, drawn evenly.

    Args:
        rows: ``tune/rows.jsonl`` of the run, rendered as they were trained on.

    Raises:
        InputError: the file is not a run's.
        ArteError: a line of it is damaged.
    """
    if not rows.is_file():
        raise InputError(f"{rows}: no such file", "`arte-edge distill` writes it; finish the run first.")
    texts = []
    for row in read_jsonl(rows):
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise InputError(f"{rows}: a row has no prompt and completion", "Finish the run again.")
        texts.append(prompt + completion)
    return _drawn(texts, n)


def seed_texts(task: Task, chat: Chat, n: int) -> tuple[str, ...]:
    """Return up to `n` seed examples of `task` with their answers, for a model that has no run."""
    texts = [
        f"{chat.render(student_messages(task, seed.input), STEPS)} {tagged(seed.target)}"
        for seed in task.seed
    ]
    return _drawn(texts, n)


def _drawn(texts: Sequence[str], n: int) -> tuple[str, ...]:
    """Return `n` of `texts` in their order, the same ones every time."""
    if len(texts) <= n:
        return tuple(texts)
    chosen = sorted(random.Random(0).sample(range(len(texts)), n))
    return tuple(texts[i] for i in chosen)

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


_DIALOGUES = (
    (
        "How do I get a coffee stain out of a cotton shirt?",
        "Rinse the stain from the back with cold water first, so that it is pushed out and not further in. "
        "Then rub in a little dish soap, leave it for ten minutes and wash the shirt as usual. If a brown edge "
        "stays, a spoonful of white vinegar in half a glass of water usually takes it away.",
    ),
    (
        "Anna has 14 marbles. She gives 5 to Ben and finds 3 more. How many does she have now?",
        "Anna starts with 14 marbles. After she gives 5 away she has 14 - 5 = 9. She finds 3 more, so she has "
        "9 + 3 = 12 marbles.",
    ),
    (
        "Write a Python function that counts the vowels in a string.",
        '```python\ndef count_vowels(text: str) -> int:\n    return sum(letter in "aeiou" for letter in '
        "text.lower())\n```\n\nThe function lowers the text first, so capital letters are counted as well.",
    ),
    (
        "Which category fits best: billing, delivery or returns? 'My parcel was left in the rain.'",
        "The customer is unhappy with how the parcel was handed over, so the category is delivery.",
    ),
    (
        "Explain to a child why the moon changes its shape.",
        "The moon does not really change. The sun lights one half of it, and as the moon walks around the earth "
        "we see more or less of the bright half. When we look at the dark half it seems to be gone, and when we "
        "look at the bright half it is a full circle.",
    ),
    (
        "Turn this into JSON: Maria Keller, 34 years old, lives in Basel and has two cats.",
        '{"name": "Maria Keller", "age": 34, "city": "Basel", "pets": [{"kind": "cat", "count": 2}]}',
    ),
    (
        "Summarise: The library will close at four on Friday because the heating is being repaired. "
        "Books can still be returned through the box at the side door.",
        "The library closes at four on Friday for heating repairs; the return box stays open.",
    ),
    (
        "Übersetze ins Englische: Der Zug nach Bern fährt heute von Gleis sieben.",
        "The train to Bern leaves from platform seven today.",
    ),
    (
        "Is the following true or false? not ( True and False ) or False",
        "First, True and False is False. Then not False is True. True or False is True. So the answer is True.",
    ),
    (
        "What should I check before a long bicycle tour?",
        "Check the brakes and the tyres first: the pads should be thicker than a coin and the tyres hard to press "
        "with a thumb. Oil the chain, tighten the bolts of the saddle and the handlebar, and pack a spare tube, "
        "a pump and a small set of keys. A short ride around the block shows whether anything rattles.",
    ),
    (
        "Give me the third and the fifth item of this list: pear, nail, cloud, river, lamp, stone.",
        "The third item is cloud and the fifth item is lamp.",
    ),
    (
        "日本で一番高い山は何ですか。",
        "日本で一番高い山は富士山です。高さは3776メートルあります。",
    ),
    (
        "How many days are there from 3 March to 10 April?",
        "March has 31 days, so from 3 March to 31 March there are 28 days. Then there are 10 more days to 10 "
        "April. Together that is 28 + 10 = 38 days.",
    ),
    (
        "Continue the story: The lighthouse keeper had not seen a ship for nine days.",
        "On the tenth morning a small boat with a torn sail came out of the fog. There was nobody at the rudder, "
        "only a grey dog that looked up at the lamp as if it had been told to find it. The keeper put down his "
        "cup, took the long rope from its nail and went down the stairs as fast as his knees would let him.",
    ),
    (
        "Fix the grammar: She don't has no time for to reading them books.",
        "She doesn't have any time to read those books.",
    ),
    (
        "Sort these numbers from small to large: 42, 7, 19, 3.5, 120, -4.",
        "From small to large: -4, 3.5, 7, 19, 42, 120.",
    ),
)


def built_in_prompts(reference: Renders) -> list[str]:
    """Return sixteen short dialogues with answers in the reference's own format: about 1,500 tokens."""
    return [
        _rendered(reference, [{"role": "user", "content": question}]) + answer
        for question, answer in _DIALOGUES
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

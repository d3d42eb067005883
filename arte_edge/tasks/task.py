"""What a task is: a description, an answer kind, technique prompts and three splits of examples.

The test split is deliberately awkward to reach. A `Task` carries the seed and
validation examples, and of the test examples only the hashes of their inputs, so
that elicitation can refuse a question that stands in the test split without
anybody having read it. `Task.load_test` is for the final evaluation alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from arte_edge.errors import InputError
from arte_edge.tasks.normalize import fold_label

__all__ = [
    "BOOLEANS",
    "SPLITS",
    "Answer",
    "Example",
    "Kind",
    "Task",
    "WorkedExample",
    "content_key",
    "listed_letters",
    "rows_sha256",
]

Kind = Literal["choice", "boolean", "number", "text"]
SPLITS = ("seed", "validation", "test")
BOOLEANS = ("True", "False")

# "(A) circle" at the start of a line, the way BIG-Bench Hard lists its options
_LINE_OPTION = re.compile(r"^[ \t]*\(([A-Z])\)", re.MULTILINE)
_ANY_OPTION = re.compile(r"\(([A-Z])\)(?=\s|$)")


def content_key(text: str) -> str:
    """Return the sha256 of `text` with whitespace runs made one blank and case folded: its identity."""
    return hashlib.sha256(" ".join(text.split()).casefold().encode()).hexdigest()


def _sha256_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()


def rows_sha256(rows: Iterable[Example]) -> str:
    """Return the sha256 of a split: every input and target, in order."""
    return _sha256_json([[row.input, row.target] for row in rows])


def listed_letters(text: str) -> tuple[str, ...]:
    """Return the option letters that `text` lists, as ``("(A)", "(B)", ...)``; empty if it lists none.

    Options stand at the starts of lines; a text without such lines may list them in running
    text. A list starts at (A) and goes on without a gap.
    """
    found = _LINE_OPTION.findall(text) or _ANY_OPTION.findall(text)
    letters: list[str] = []
    for letter in found:
        if letter == chr(ord("A") + len(letters)):
            letters.append(letter)
    return tuple(f"({letter})" for letter in letters) if len(letters) > 1 else ()


@dataclass(frozen=True)
class Example:
    """One labelled input of a task; `target` is the right answer in its canonical form."""

    input: str
    target: str

    @cached_property
    def key(self) -> str:
        """The identity of the input: two examples with one key are the same question."""
        return content_key(self.input)


class Answer(BaseModel):
    """What answers look like. `arte_edge.tasks.answers` says how they are read and compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind = Field(description="choice, boolean, number or text")
    choices: tuple[str, ...] = Field(
        default=(), description="the fixed labels of a closed set; empty with kind choice: letters as listed"
    )

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: tuple[str, ...]) -> tuple[str, ...]:
        folded = [fold_label(choice) for choice in choices]
        if "" in folded:
            raise ValueError("a choice needs at least one letter or digit")
        if len(set(folded)) < len(folded):
            raise ValueError("two choices differ only in case, spaces or punctuation")
        if len(choices) == 1:
            raise ValueError("a closed set needs at least two choices")
        return choices

    @model_validator(mode="after")
    def _choices_fit_kind(self) -> Answer:
        if self.choices and self.kind != "choice":
            raise ValueError(f'choices go with kind = "choice", not with "{self.kind}"')
        return self

    @property
    def closed(self) -> bool:
        """True if every answer comes from a set that is known beforehand."""
        return self.kind in ("choice", "boolean")

    @property
    def letters(self) -> bool:
        """True if the answer is the letter of an option that the input lists."""
        return self.kind == "choice" and not self.choices

    def options(self, text: str) -> tuple[str, ...]:
        """Return the possible answers to the input `text`, canonical; empty for open kinds."""
        if self.kind == "boolean":
            return BOOLEANS
        if self.letters:
            return listed_letters(text)
        return self.choices


class WorkedExample(BaseModel):
    """A hand-written example with its reasoning: what a good rationale of this task looks like.

    Shown to the teacher, where teacher.shots asks for it; small teachers need it most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str = Field(description="a question of the task, in no split but seed")
    reasoning: str = Field(description="one to three short sentences that lead to the answer")
    target: str = Field(description="the right answer")


def _no_test() -> tuple[Example, ...]:
    return ()


@dataclass(frozen=True)
class Task:
    """A task as the rooms use it.

    `folder` is the task folder, or None where the examples came from elsewhere; then
    `split_seed` repeats the split. `notes` say what a loader dropped, and why.
    """

    name: str
    description: str
    answer: Answer
    techniques: tuple[str, ...]
    seed: tuple[Example, ...]
    validation: tuple[Example, ...]
    worked: tuple[WorkedExample, ...] = ()
    folder: Path | None = None
    split_seed: int | None = None
    notes: tuple[str, ...] = ()
    # of the test rows only hashes: enough to refuse overlap and to notice a change, not enough to read
    test_inputs: frozenset[str] = field(default=frozenset(), repr=False)
    test_sha256: str = ""
    test_loader: Callable[[], tuple[Example, ...]] = field(default=_no_test, repr=False, compare=False)

    def test_keys(self) -> frozenset[str]:
        """Return the `Example.key` of every test example, for refusing overlap unseen."""
        return self.test_inputs

    def load_test(self) -> tuple[Example, ...]:
        """Read the test split. The final evaluation alone calls this.

        Raises:
            InputError: the test file is no longer the one that the task was loaded with.
        """
        test = self.test_loader()
        if rows_sha256(test) != self.test_sha256:
            raise InputError(
                f"The test split of task '{self.name}' changed after the task was loaded",
                "Load the task again, or start a new run: figures before and after do not compare.",
            )
        return test

    @cached_property
    def sha256(self) -> str:
        """The identity of the task: its words (description to worked examples) and the three splits."""
        splits = [rows_sha256(self.seed), rows_sha256(self.validation), self.test_sha256]
        worked = [example.model_dump() for example in self.worked]
        words = [self.description, self.answer.model_dump(mode="json"), list(self.techniques), worked]
        return _sha256_json([words, splits])

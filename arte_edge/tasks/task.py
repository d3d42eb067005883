"""A task: a description, an answer kind, technique prompts and three splits of examples.

A `Task` holds the seed and validation examples, but of the test split only hashes of the inputs, so that
elicitation can reject a test question without reading it. Only the final evaluation calls `Task.load_test`.

Problems of a task are collected as `Problem`, so that they can be fixed at once; `quality_warnings` tells weak data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from arte_edge.errors import InputError
from arte_edge.tasks import structured

Kind = Literal["choice", "boolean", "number", "text", "json"]
SPLITS = ("seed", "validation", "test")
BOOLEANS = ("True", "False")
ANSWER_TAG = re.compile("</?ans>", re.IGNORECASE)  # the marks around an answer

# "(A) circle" at the start of a line, as in BIG-Bench Hard
_LINE_OPTION = re.compile(r"^[ \t]*\(([A-Z])\)", re.MULTILINE)
_JSON = json.JSONEncoder(ensure_ascii=False)
_ANY_OPTION = re.compile(r"\(([A-Z])\)(?=\s|$)")


def content_key(text: str) -> str:
    """Return the sha256 of `text` with collapsed whitespace and folded case: its identity."""
    # Most texts have single blanks alone, which is told faster than it is made so.
    if "  " in text or not text.isprintable() or text[:1] == " " or text[-1:] == " ":
        text = " ".join(text.split())
    return hashlib.sha256(text.casefold().encode()).hexdigest()


def rows_sha256(rows: Iterable[Example]) -> str:
    """Return the sha256 of a split: every input and target, in order."""
    # The JSON of [[input, target], ...], without holding a million lists at once.
    pairs, digest, before = ((row.input, row.target) for row in rows), hashlib.sha256(b"["), ""
    while block := list(islice(pairs, 10_000)):
        digest.update(f"{before}{_JSON.encode(block)[1:-1]}".encode())
        before = ", "
    digest.update(b"]")
    return digest.hexdigest()


def listed_letters(text: str) -> tuple[str, ...]:
    """Return the option letters in `text`, as ``("(A)", "(B)", ...)``.

    Options are at the starts of lines; without such lines anywhere in the text. Letters start at (A), without gaps.
    """
    found = _LINE_OPTION.findall(text) or _ANY_OPTION.findall(text)
    letters: list[str] = []
    for letter in found:
        if letter == chr(ord("A") + len(letters)):
            letters.append(letter)
    return tuple(f"({letter})" for letter in letters) if len(letters) > 1 else ()


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled input of a task; examples with equal keys are the same question."""

    input: str
    target: str  # the correct answer as written; of closed kinds one of the options
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", content_key(self.input))


class Answer(BaseModel):
    """The form of a task's answers; `arte_edge.tasks.answers` parses and compares them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind = Field(description="choice, boolean, number, text or json")
    choices: tuple[str, ...] = Field(
        default=(), description="fixed labels of a closed set; a choice without labels: letters of options in the input"
    )
    exact: bool = Field(default=False, description="text and json: compare texts as written, except blanks at the ends")
    # In task.toml the name of a file: schema = "answer.schema.json", or tools = "tools.json".
    json_schema: str = Field(default="", description="json: the schema of an answer, as text")

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: tuple[str, ...]) -> tuple[str, ...]:
        labels = {choice.strip() for choice in choices}
        if "" in labels or any(ANSWER_TAG.search(label) for label in labels):
            raise ValueError("a choice is not empty and holds no <ans> or </ans>")
        if len(labels) < len(choices):
            raise ValueError("two choices are the same")
        if len(choices) == 1:
            raise ValueError("a closed set needs at least two choices")
        return choices

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, text: str) -> str:
        return structured.schema_text(json.loads(text)) if text else ""

    @model_validator(mode="after")
    def _parts_fit_kind(self) -> Answer:
        if self.choices and self.kind != "choice":
            raise ValueError(f'choices go with kind = "choice", not with "{self.kind}"')
        if self.exact and self.kind not in ("text", "json"):
            raise ValueError(f'exact goes with kind = "text" or "json", not with "{self.kind}"')
        if self.json_schema and self.kind != "json":
            raise ValueError(f'a schema goes with kind = "json", not with "{self.kind}"')
        if self.kind == "json" and not self.json_schema:
            raise ValueError('kind = "json" needs schema = "answer.schema.json", or tools = "tools.json"')
        return self

    @property
    def closed(self) -> bool:
        """True if the set of answers is known in advance."""
        return self.kind in ("choice", "boolean")

    @property
    def letters(self) -> bool:
        """True if the answer is the letter of an option in the input."""
        return self.kind == "choice" and not self.choices

    def options(self, text: str) -> tuple[str, ...]:
        """Return the possible answers to the input `text`, canonical; empty for open kinds."""
        if self.kind == "boolean":
            return BOOLEANS
        if self.letters:
            return listed_letters(text)
        return self.choices


class FewShotExample(BaseModel):
    """A hand-written example with a good rationale, for the teacher's prompt (``teacher.shots`` of them)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str = Field(description="a question of the task, not in validation or test")
    reasoning: str = Field(description="one to three short sentences that lead to the answer")
    target: str = Field(description="the correct answer")


@dataclass(frozen=True)
class Task:
    """A loaded task.

    `folder` is the task folder, or None for other sources; then `split_seed` repeats the split. `notes` list what
    a loader dropped, and why.
    """

    name: str
    description: str
    answer: Answer
    techniques: tuple[str, ...]
    seed: tuple[Example, ...]
    validation: tuple[Example, ...]
    worked: tuple[FewShotExample, ...] = ()
    folder: Path | None = None
    split_seed: int | None = None
    notes: tuple[str, ...] = ()
    # Only hashes of the test rows: enough to detect overlap and changes, not enough to read them.
    test_inputs: frozenset[str] = field(default=frozenset(), repr=False)
    test_sha256: str = ""
    test_loader: Callable[[], tuple[Example, ...]] = field(default=tuple, repr=False, compare=False)

    def test_keys(self) -> frozenset[str]:
        """Return the `Example.key` of every test example, for detecting overlap."""
        return self.test_inputs

    def load_test(self) -> tuple[Example, ...]:
        """Read the test split. Only the final evaluation calls this.

        Raises InputError: the test file changed since the task was loaded.
        """
        test = self.test_loader()
        if rows_sha256(test) != self.test_sha256:
            what = f"The test split of task '{self.name}' changed after the task was loaded"
            raise InputError(what, "Load it again, or start a new run: results before are not comparable.")
        return test

    @cached_property
    def sha256(self) -> str:
        """The identity of the task: its texts (description to few-shot examples) and the three splits."""
        splits = [rows_sha256(self.seed), rows_sha256(self.validation), self.test_sha256]
        few_shot = [example.model_dump() for example in self.worked]
        later = {key for key in ("exact", "json_schema") if not getattr(self.answer, key)}
        answer = self.answer.model_dump(mode="json", exclude=later)
        texts = [self.description, answer, list(self.techniques), few_shot]
        return hashlib.sha256(json.dumps([texts, splits], ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Problem:
    """A problem at `where`, which is ``file:line`` or ``file: key``; `hint` says how to fix it."""

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def raise_first(problems: Sequence[Problem], ref: str) -> None:
    """Raise `InputError` for the first of `problems`, if there are any, with the command that lists the others."""
    if not problems:
        return
    first, others = problems[0], len(problems) - 1
    more = f"{others} more: `arte-edge tasks check {ref}` lists them all." if others else ""
    raise InputError(str(first), " ".join(part for part in (first.hint, more) if part))


_GOOD_VALIDATION = 60
_TOO_COMMON = 0.7


def quality_warnings(task: Task) -> list[str]:
    """Return warnings about the data of `task`: few validation rows, answers that are missing or too common."""
    warnings = list(task.notes)
    if len(task.validation) < _GOOD_VALIDATION:
        n = len(task.validation)
        warnings.append(f"validation: {n} rows rank questions poorly; {_GOOD_VALIDATION} to 100 are good")
    if task.answer.closed:
        for split, rows in (("seed", task.seed), ("validation", task.validation)):
            warnings += _balance_warnings(split, rows, task.answer)
    return warnings


def _balance_warnings(split: str, rows: tuple[Example, ...], answer: Answer) -> list[str]:
    counts = Counter(row.target for row in rows)
    warnings = []
    possible = {option for row in rows for option in answer.options(row.input)}
    if missing := sorted(possible - set(counts)):
        warnings.append(f"{split}: no example of {', '.join(missing)}")
    answer_text, n = counts.most_common(1)[0]
    if n > _TOO_COMMON * len(rows):
        warnings.append(f"{split}: {n} of {len(rows)} answers are {answer_text}; always guessing it looks like skill")
    return warnings

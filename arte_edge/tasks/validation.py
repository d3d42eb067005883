"""Problems of a task, collected so that ten rows can be fixed at once, and warnings about weak data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from arte_edge.errors import InputError, nearest
from arte_edge.tasks.task import Answer, Example, Task

__all__ = ["Problem", "advise", "explain_validation", "refuse"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where` is ``file:line`` or ``file: key``; `hint` says what to do."""

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def refuse(problems: Sequence[Problem], ref: str) -> None:
    """Raise the first of `problems` with its hint, and say how to see the others.

    Raises:
        InputError: unless there are no problems.
    """
    if not problems:
        return
    first, others = problems[0], len(problems) - 1
    more = f"{others} more: `arte-edge tasks check {ref}` lists them all." if others else ""
    raise InputError(str(first), " ".join(part for part in (first.hint, more) if part))


def explain_validation(error: ValidationError, model: type[BaseModel], file: str) -> Iterator[Problem]:
    """Turn each complaint of pydantic about `file` into a problem; an unknown key names its nearest."""
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        key = ".".join(path) or "(the whole file)"
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, path[:-1])
            yield Problem(f"{file}: {key}", "unknown key", nearest(path[-1], known))
        elif item["type"] == "missing":
            yield Problem(f"{file}: {key}", "this key is missing")
        else:
            yield Problem(f"{file}: {key}", item["msg"].removeprefix("Value error, "))


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Return the keys that `model` knows in the table at `path`; a number in it is a place in a list."""
    at: Any = model
    for part in path:
        at = get_args(at)[0] if part.isdecimal() else at.model_fields[part].annotation
    return list(at.model_fields)


_GOOD_VALIDATION = 60
_TOO_COMMON = 0.7


def advise(task: Task) -> list[str]:
    """Return remarks on `task`: thin validation, answers that are missing or far too common."""
    remarks = list(task.notes)
    if len(task.validation) < _GOOD_VALIDATION:
        n = len(task.validation)
        remarks.append(f"validation: {n} rows rank questions poorly, {_GOOD_VALIDATION} to 100 are good")
    if task.answer.closed:
        for split, rows in (("seed", task.seed), ("validation", task.validation)):
            remarks += _about_balance(split, rows, task.answer)
    return remarks


def _about_balance(split: str, rows: tuple[Example, ...], answer: Answer) -> list[str]:
    counts = Counter(row.target for row in rows)
    remarks = []
    possible = {option for row in rows for option in answer.options(row.input)}
    if missing := sorted(possible - set(counts)):
        remarks.append(f"{split}: no example of {', '.join(missing)}")
    answer_text, n = counts.most_common(1)[0]
    if n > _TOO_COMMON * len(rows):
        remarks.append(f"{split}: {n} of {len(rows)} answers are {answer_text}; guessing it looks like skill")
    return remarks

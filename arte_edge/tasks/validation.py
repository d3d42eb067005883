"""Problems of a task, collected so that they can be fixed at once, and warnings about weak data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from arte_edge.errors import InputError
from arte_edge.tasks.task import Answer, Example, Task


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
        warnings.append(
            f"{split}: {n} of {len(rows)} answers are {answer_text}; always guessing it looks like skill"
        )
    return warnings

"""What is not wrong with a task but will make its figures weak."""

from __future__ import annotations

from collections import Counter

from arte_edge.tasks.task import Answer, Example, Task

__all__ = ["advise"]

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

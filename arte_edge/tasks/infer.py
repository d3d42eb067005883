"""Infers the answer kind of a table whose author did not say it, from the targets alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from arte_edge.tasks.normal import fold_label
from arte_edge.tasks.number import canonical_number
from arte_edge.tasks.task import Answer

__all__ = ["infer_answer"]

# Published sets have a few broken rows (a film title with a comma became two options);
# they must not turn a multiple-choice task into free text.
_ALMOST_ALL = 0.95
_MAX_LABELS = 12
_MIN_ROWS_A_LABEL = 5
_LETTER = re.compile(r"\([A-Z]\)")


def infer_answer(targets: Sequence[str]) -> Answer:
    """Return the answer kind of `targets`.

    Letters like ``(A)`` make a choice of letters; True and False a boolean; numbers a number; at
    most 12 labels that each occur five times on average a closed set, in alphabetical order;
    anything else is text.
    """
    if not targets:
        return Answer(kind="text")
    letters = sum(bool(_LETTER.fullmatch(target.strip())) for target in targets)
    if letters >= _ALMOST_ALL * len(targets):
        return Answer(kind="choice")
    labels = Counter(fold_label(target) for target in targets)
    if set(labels) <= {"true", "false"}:
        return Answer(kind="boolean")
    if all(canonical_number(target) is not None and target.strip()[-1].isdigit() for target in targets):
        return Answer(kind="number")
    if (
        2 <= len(labels) <= _MAX_LABELS
        and "" not in labels
        and len(targets) >= _MIN_ROWS_A_LABEL * len(labels)
    ):
        spelling = {fold_label(target): target.strip() for target in reversed(targets)}
        return Answer(kind="choice", choices=tuple(spelling[label] for label in sorted(labels)))
    return Answer(kind="text")

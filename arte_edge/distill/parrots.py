"""Refuse rationales that a teacher repeats whatever the question is.

A small teacher copies from its instructions: told to restate a request "as a plain order", it answers
every question with the example in that instruction. Such a text says nothing of its question, its answer
is right by luck, and a student that is trained on it learns one answer (docs/score-worth.md: in groups of
drafts the share of parroted ones decided over the student more than any score did). Short reasoning may
well serve two questions, so a text counts as parroted from the third on, or from a twentieth of all.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from arte_edge.tasks.task import content_key

__all__ = ["refuse_parrots"]

_QUESTIONS, _SHARE = 2, 0.05  # a text may stand under so many questions, or under this share of them


def refuse_parrots(rationales: Sequence[dict[str, Any]]) -> int:
    """Set ``usable`` to False, in place, on each usable rationale that is parroted; return how many were."""
    under: dict[str, set[str]] = defaultdict(set)
    for row in rationales:
        under[content_key(row["text"])].add(row["question"])
    most = max(_QUESTIONS, math.floor(_SHARE * len({row["question"] for row in rationales})))
    refused = 0
    for row in rationales:
        if row["usable"] and len(under[content_key(row["text"])]) > most:
            row["usable"] = False
            refused += 1
    return refused

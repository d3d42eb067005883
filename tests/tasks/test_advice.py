"""Remarks on tasks that are sound but weak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from arte_edge import catalog
from arte_edge.tasks.advice import advise
from arte_edge.tasks.folder import load_folder
from arte_edge.tasks.load import load_task


@pytest.mark.parametrize("name", catalog.names("tasks"))
def test_a_shipped_task_deserves_no_remark(name: str) -> None:
    assert advise(load_task(name)) == []


def test_thin_and_lopsided_splits_are_remarked_on(parity: Path) -> None:
    task = load_folder(parity)
    odd = tuple(row for row in task.validation if row.target == "odd")
    even = tuple(row for row in task.validation if row.target == "even")
    weak = replace(task, seed=even[:3], validation=odd * 4 + even, notes=("dropped 1 row",))
    assert advise(weak) == [
        "dropped 1 row",
        "validation: 50 rows rank questions poorly, 60 to 100 are good",
        "seed: no example of odd",
        "seed: 3 of 3 answers are even; guessing it looks like skill",
        "validation: 40 of 50 answers are odd; guessing it looks like skill",
    ]

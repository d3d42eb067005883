"""Problems and warnings of a task."""

from dataclasses import replace
from pathlib import Path

from arte_edge.tasks.folder import load_folder
from arte_edge.tasks.task import quality_warnings


def test_small_and_unbalanced_splits_have_warnings(parity: Path) -> None:
    task = load_folder(parity)
    odd = tuple(row for row in task.validation if row.target == "odd")
    even = tuple(row for row in task.validation if row.target == "even")
    weak = replace(task, seed=even[:3], validation=odd * 4 + even, notes=("dropped 1 row",))
    parts = ("dropped 1 row", "50 rows", "no example of odd", "3 of 3 answers are even", "40 of 50 answers")
    for warning, part in zip(quality_warnings(weak), parts, strict=True):
        assert part in warning

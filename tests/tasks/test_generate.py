"""The shipped data is the generators' output, byte for byte, and keeps its promises."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from arte_edge import catalog
from arte_edge.tasks.generate import GENERATORS, main, write_data
from arte_edge.tasks.load import load_task
from arte_edge.tasks.task import SPLITS

NAMES = catalog.names("tasks")


def test_every_shipped_task_has_a_generator() -> None:
    assert sorted(GENERATORS) == NAMES
    assert len(NAMES) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_data_is_what_the_generator_writes(name: str, tmp_path: Path) -> None:
    write_data(name, tmp_path)
    for split in SPLITS:
        committed = catalog.find("tasks", name) / f"{split}.jsonl"
        assert (tmp_path / committed.name).read_bytes() == committed.read_bytes(), committed


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_task_has_40_100_and_200_rows_and_four_techniques(name: str) -> None:
    task = load_task(name)
    assert (len(task.seed), len(task.validation), len(task.load_test())) == (40, 100, 200)
    assert len(set(task.techniques)) == 4
    assert all("one to three short sentences" in technique for technique in task.techniques)
    assert not any("<ans>" in technique for technique in task.techniques)


@pytest.mark.parametrize("name", NAMES)
def test_closed_answers_are_balanced_in_every_split(name: str) -> None:
    task = load_task(name)
    for rows in (task.seed, task.validation, task.load_test()):
        counts = Counter(row.target.split("(")[0] or row.target for row in rows)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing"]) == 2
    assert "known: boolean_expressions" in capsys.readouterr().out

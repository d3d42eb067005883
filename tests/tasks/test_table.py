"""Tasks made of labelled tables: a few bad rows are dropped and said, many are an error."""

from __future__ import annotations

import pytest

from arte_edge.errors import InputError
from arte_edge.tasks.table import Record, clean, prose, task_from_table
from arte_edge.tasks.task import Answer


def records(n_rows: int = 100) -> list[Record]:
    return [Record(f"t:{n}", f"Is {n} even?", "no" if n % 2 else "yes") for n in range(n_rows)]


def test_a_table_becomes_a_task_with_general_prompts() -> None:
    task = task_from_table("even", records(), split_seed=3)
    assert task.answer == Answer(kind="choice", choices=("no", "yes"))
    assert "no, yes" in task.description
    assert len(task.techniques) == 4
    assert (task.folder, task.split_seed, task.notes) == (None, 3, ())
    assert (len(task.seed), len(task.validation), len(task.load_test())) == (28, 42, 30)
    assert task.sha256 != task_from_table("even", records(), split_seed=4).sha256


def test_what_the_caller_says_is_kept() -> None:
    task = task_from_table(
        "even", records(), description="Even?", techniques=("a", "b"), answer=Answer(kind="text")
    )
    assert (task.description, task.techniques, task.answer.kind) == ("Even?", ("a", "b"), "text")


def test_splits_of_a_table_are_disjoint() -> None:
    task = task_from_table("even", records())
    seen = {row.key for row in task.seed} | {row.key for row in task.validation}
    assert len(seen) == 70
    assert not seen & task.test_keys()


def test_repeated_disputed_and_unfit_rows_are_dropped_and_said() -> None:
    rows = [
        *records(),
        Record("t:r", "is 1  EVEN?", "no"),
        Record("t:d", "Is 2 even?", "no"),
        Record("t:u", "x", "?"),
    ]
    examples, notes = clean(rows, Answer(kind="choice", choices=("yes", "no")))
    assert len(examples) == 99
    assert not any(example.input == "Is 2 even?" for example in examples)
    assert notes == [
        "dropped t:u: target '?' is not one of yes, no",
        "dropped 2 repeated rows",
        "dropped 1 inputs that occur with two different targets",
    ]


def test_many_unfit_rows_are_an_error_about_the_columns() -> None:
    with pytest.raises(InputError, match="100 of 100 rows do not fit the answer kind 'number'; first: t:0"):
        clean(records(), Answer(kind="number"))


@pytest.mark.parametrize("kind", ["choice", "label", "boolean", "number", "text"])
def test_general_prompts_exist_for_every_kind(kind: str) -> None:
    techniques = prose("generic")[kind]["techniques"]
    assert isinstance(techniques, list)
    assert len(set(techniques)) == 4
    assert all("one to three short sentences" in technique for technique in techniques)

"""A task made from a labelled table: answer kind, split, dropped rows."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.errors import InputError
from arte_edge.tasks.from_table import (
    Record,
    clean,
    infer_answer,
    prose,
    split_examples,
    split_sizes,
    task_from_table,
)
from arte_edge.tasks.task import Answer, Example


@pytest.mark.parametrize(
    ("targets", "answer"),
    [
        (["(A)", "(B)"] * 20, Answer(kind="choice")),
        (["(A)", "(B)"] * 20 + ["Monsters, Inc"], Answer(kind="choice")),
        (["True", "false"] * 5, Answer(kind="boolean")),
        (["1", "-35", "1,200"], Answer(kind="number")),
        (["Yes", "No"] * 5, Answer(kind="choice", choices=("No", "Yes"))),
        (["valid ", "invalid"] * 5, Answer(kind="choice", choices=("invalid", "valid"))),
        (["yes", "no"], Answer(kind="text")),
        ([") ]", "> }", ")"] * 20, Answer(kind="text")),
        (["Paris", "Rome", "Oslo", "Kyiv"], Answer(kind="text")),
        (["3 apples", "4 pears"], Answer(kind="text")),
        ([], Answer(kind="text")),
    ],
)
def test_the_kind_follows_from_the_targets(targets: list[str], answer: Answer) -> None:
    assert infer_answer(targets) == answer


def test_one_broken_row_in_ten_is_not_a_choice_of_letters() -> None:
    assert infer_answer(["(A)"] * 9 + ["Paris"]).choices != ()


TEXT = Answer(kind="text")
BOOLEAN = Answer(kind="boolean")


def examples(n_rows: int, share_true: float = 0.5) -> list[Example]:
    return [Example(f"Statement {n}.", str(n < share_true * n_rows)) for n in range(n_rows)]


@pytest.mark.parametrize(
    ("n_rows", "sizes"), [(250, (40, 100, 110)), (187, (40, 78, 69)), (146, (40, 61, 45)), (50, (14, 21, 15))]
)
def test_split_sizes_depend_on_the_size_of_the_table(n_rows: int, sizes: tuple[int, int, int]) -> None:
    assert tuple(split_sizes(n_rows).values()) == sizes


def test_too_small_a_table_says_how_many_rows_are_needed() -> None:
    with pytest.raises(InputError, match="49 usable rows cannot be split: at least 50"):
        split_sizes(49)


@given(st.integers(50, 600), st.integers(0, 10**6))
def test_every_row_goes_to_exactly_one_split(n_rows: int, seed: int) -> None:
    splits = split_examples(examples(n_rows), BOOLEAN, seed)
    everything = [row for rows in splits.values() for row in rows]
    assert sorted(everything, key=lambda row: row.input) == sorted(
        examples(n_rows), key=lambda row: row.input
    )


@pytest.mark.parametrize("answer", [TEXT, BOOLEAN])
def test_the_order_of_the_file_does_not_matter_and_the_seed_does(answer: Answer) -> None:
    rows = examples(120)
    assert split_examples(rows, answer, 1) == split_examples(rows[::-1], answer, 1)
    assert split_examples(rows, answer, 1) != split_examples(rows, answer, 2)


def test_a_split_never_changes() -> None:
    # Published results name their split by its seed.
    seed_split = split_examples(examples(60), TEXT, 0)["seed"]
    assert [row.input for row in seed_split[:4]] == [
        "Statement 49.",
        "Statement 8.",
        "Statement 34.",
        "Statement 51.",
    ]


@given(st.floats(0.1, 0.9), st.integers(0, 10**6))
def test_closed_answers_keep_their_proportion_in_each_split(share: float, seed: int) -> None:
    rows = examples(200, share)
    expected = Counter(row.target for row in rows)["True"] / 200
    for part in split_examples(rows, BOOLEAN, seed).values():
        n_true = Counter(row.target for row in part)["True"]
        assert abs(n_true - expected * len(part)) <= 2


def test_the_first_rows_of_a_split_are_as_mixed_as_a_random_sample() -> None:
    # The standard deviation of such a sample (40 of 100, half of them True) is 2.46.
    rows = examples(250, 0.5)
    firsts = [split_examples(rows, BOOLEAN, seed)["validation"][:40] for seed in range(200)]
    off = [sum(row.target == "True" for row in first) - 20 for first in firsts]
    assert (sum(n * n for n in off) / len(off)) ** 0.5 < 3.0


def test_a_table_can_be_cut_to_a_number_of_rows() -> None:
    splits = split_examples(examples(500), BOOLEAN, 0, max_rows=100)
    assert [len(rows) for rows in splits.values()] == [28, 42, 30]


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


def test_given_parts_are_used() -> None:
    task = task_from_table(
        "even", records(), description="Even?", techniques=("a", "b"), answer=Answer(kind="text")
    )
    assert (task.description, task.techniques, task.answer.kind) == ("Even?", ("a", "b"), "text")


def test_splits_of_a_table_are_disjoint() -> None:
    task = task_from_table("even", records())
    seen = {row.key for row in task.seed} | {row.key for row in task.validation}
    assert len(seen) == 70
    assert not seen & task.test_keys()


def test_repeated_ambiguous_and_unfit_rows_are_dropped_with_a_note() -> None:
    rows = [
        *records(),
        Record("t:r", "is 1  EVEN?", "no"),
        Record("t:d", "Is 2 even?", "no"),
        Record("t:u", "x", "?"),
    ]
    examples, notes = clean(rows, Answer(kind="choice", choices=("yes", "no")))
    assert len(examples) == 99
    assert not any(example.input == "Is 2 even?" for example in examples)
    for note, part in zip(notes, ("t:u: target '?'", "2 repeated", "1 inputs with two"), strict=True):
        assert part in note


def test_many_unfit_rows_are_an_error_about_the_columns() -> None:
    with pytest.raises(InputError, match="100 of 100 rows do not fit the answer kind 'number'; first: t:0"):
        clean(records(), Answer(kind="number"))


@pytest.mark.parametrize("kind", ["choice", "label", "boolean", "number", "text"])
def test_general_prompts_exist_for_every_kind(kind: str) -> None:
    techniques = prose("generic")[kind]["techniques"]
    assert isinstance(techniques, list)
    assert len(set(techniques)) == 4
    assert all("one to three short sentences" in technique for technique in techniques)

"""A task made from a labelled table: answer kind, split, dropped rows."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.errors import InputError
from arte_edge.tasks import from_table
from arte_edge.tasks.answers import comparable, extract, matches
from arte_edge.tasks.folder import load_folder
from arte_edge.tasks.from_table import Split, clean, infer_answer, split_examples, task_from_table
from arte_edge.tasks.scaffold import write_task
from arte_edge.tasks.tables import Table, read_table
from arte_edge.tasks.task import Answer, Example


def table(targets: Sequence[str], text: str = "row {}\n(A) x\n(B) y") -> Table:
    return Table("t", [(n, text.format(n), target) for n, target in enumerate(targets)])


def labels(*names: str) -> Answer:
    return Answer(kind="choice", choices=names)


NUMBER, TEXT, EXACT = Answer(kind="number"), Answer(kind="text"), Answer(kind="text", exact=True)


SETS = [
    *(["3.1", "3.10", "3.2"], ["007", "70"], ["1,200", "12"], ["-0", "0"], ["C", "C#", "C++"], ["false", "true"]),
    *(["class_1", "LABEL_0", "level 1"], ["<=50K", ">50K"], ["+", "-", "🙂"], ["one\ntwo", "one two"]),
    ["no", "Yes", "Yes.", "yes", "Ｙes"],
]


@pytest.mark.parametrize(
    ("targets", "answer"),
    [
        (["(A)", "(B)"] * 20, Answer(kind="choice")),
        (["(A)", "(B)"] * 20 + ["Monsters, Inc"], Answer(kind="choice")),
        (["(A)", "(B)", "A"] * 20, labels("(A)", "A", "(B)")),
        (["(A)", "(Z)"] * 20, labels("(A)", "(Z)")),  # the inputs list no (Z)
        ((["(A)"] * 9 + ["Paris"]) * 5, labels("(A)", "Paris")),
        (["True", "False"] * 5, Answer(kind="boolean")),
        (["1", "-35", "1.50"], NUMBER),
        (["<ans>x</ans>", "a", "b"] * 5, labels("a", "b")),
        *((names * 5, labels(*names)) for names in SETS),
        *((answers, TEXT) for answers in (["yes", "no"], ["x" * 101, "y"] * 5, ["3 apples", "4 pears"], [])),
        *((answers, EXACT) for answers in (["Paris", "paris"], ["!", "?"])),
    ],
)
def test_the_kind_is_one_in_which_no_two_answers_are_the_same(targets: list[str], answer: Answer) -> None:
    assert infer_answer(table(targets).records) == answer
    if answer.choices:
        assert set(answer.choices) == set(targets) - {"<ans>x</ans>"}


CHARACTERS = st.sampled_from("aAbB105.,-+#<> _()!é\u0301Ａ\n\"'%")
ANSWERS = st.text(CHARACTERS, min_size=1).map(str.strip).filter(bool)


@given(st.lists(ANSWERS, min_size=1, max_size=14, unique=True), st.integers(1, 6))
def test_distinct_answers_stay_distinct_in_the_file_and_in_scoring(answers: list[str], times: int) -> None:
    rows = table(answers * times)
    answer = infer_answer(rows.records)
    good, _ = clean(rows, answer)
    assert [example.target for example in good] == answers * times
    assert len({comparable(target, answer) for target in answers}) == len(answers)
    for target in answers:
        given = extract(f"so <ans> {target} </ans>", answer)
        assert [other for other in answers if matches(given, other, answer)] == [target]


BOOLEAN = Answer(kind="boolean")


def examples(n_rows: int, share_true: float = 0.5) -> list[Example]:
    return [Example(f"Statement {n}.", str(n < share_true * n_rows)) for n in range(n_rows)]


@pytest.mark.parametrize(
    ("n_rows", "sizes"), [(250, (40, 100, 110)), (187, (40, 78, 69)), (146, (40, 61, 45)), (50, (14, 21, 15))]
)
def test_split_sizes_depend_on_the_size_of_the_table(n_rows: int, sizes: tuple[int, int, int]) -> None:
    assert tuple(from_table.split_sizes(n_rows).values()) == sizes
    with pytest.raises(InputError, match="49 usable rows cannot be split: at least 50"):
        from_table.split_sizes(49)


@given(st.integers(50, 600), st.integers(0, 10**6))
def test_every_row_goes_to_exactly_one_split(n_rows: int, seed: int) -> None:
    splits = split_examples(examples(n_rows), BOOLEAN, seed)
    everything = [row.input for rows in splits.values() for row in rows]
    assert sorted(everything) == sorted(row.input for row in examples(n_rows))


@pytest.mark.parametrize("answer", [TEXT, BOOLEAN])
def test_the_order_of_the_file_does_not_matter_and_the_seed_does(answer: Answer) -> None:
    rows = examples(120)
    assert split_examples(rows, answer, 1) == split_examples(rows[::-1], answer, 1)
    assert split_examples(rows, answer, 1) != split_examples(rows, answer, 2)


def test_a_split_never_changes() -> None:
    # Published results name their split by its seed.
    seed_split = split_examples(examples(60), TEXT, 0)["seed"]
    assert [row.input.split()[1] for row in seed_split[:4]] == ["49.", "8.", "34.", "51."]


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


@given(st.integers(50, 400), st.integers(1, 4), st.integers(0, 10**6))
def test_a_rare_label_is_in_validation_then_in_the_other_splits(n_rows: int, n_rare: int, seed: int) -> None:
    rows = [Example(f"Statement {n}.", "rare" if n < n_rare else "ab"[n % 2]) for n in range(n_rows)]
    answer = labels("a", "b", "rare")
    splits = split_examples(rows, answer, seed)
    assert {split: len(part) for split, part in splits.items()} == from_table.split_sizes(n_rows)
    with_rare = {split for split, part in splits.items() if any(row.target == "rare" for row in part)}
    assert "validation" in with_rare and len(with_rare) == min(n_rare, 3)


def test_labels_of_a_set_too_long_for_a_closed_one_are_in_validation() -> None:
    many = [Example(f"Statement {n}.", f"intent {n % 20}") for n in range(400)]
    assert {row.target for row in split_examples(many, TEXT, 0)["validation"]} == {row.target for row in many}


PARITY = [("yes", "no")[n % 2] for n in range(100)]


def test_a_table_becomes_a_task_with_general_prompts() -> None:
    task = task_from_table("even", table(PARITY), Split(3))
    assert task.answer == labels("no", "yes")
    assert "no, yes" in task.description
    assert '"10,0", "3,5"' in task_from_table("t", table(["3,5", "10,0"] * 30)).description
    assert len(task.techniques) == 4
    assert (task.folder, task.split_seed, task.notes) == (None, 3, ())
    assert (len(task.seed), len(task.validation), len(task.load_test())) == (28, 42, 30)
    assert task.sha256 != task_from_table("even", table(PARITY), Split(4)).sha256
    seen = {row.key for row in task.seed} | {row.key for row in task.validation}
    assert len(seen) == 70
    assert not seen & task.test_keys()


def test_repeated_conflicting_and_unfit_rows_are_dropped_with_a_note() -> None:
    rows = table(PARITY, "Is {} even?")
    rows.records += [(200, "is 0  EVEN?", "yes"), (201, "Is 2 even?", "no"), (202, "x", "?")]
    examples, notes = clean(rows, labels("yes", "no"))
    assert len(examples) == 99
    assert not any(example.input == "Is 2 even?" for example in examples)
    for note, part in zip(
        notes,
        ("t[202]: target '?'", "1 row already seen (row 200)", "inputs with different answers dropped: 1"),
        strict=True,
    ):
        assert part in note


def test_many_unfit_rows_are_an_error_and_odd_answers_are_named() -> None:
    rows = table(["Yes", "yes", "N/A"] * 30)
    notes = clean(rows, infer_answer(rows.records))[1]
    assert "'Yes', 'yes'" in notes[0] and "'N/A' (30 rows)" in notes[1]
    with pytest.raises(InputError, match=r"100 of 100 rows cannot be used; first: t\[0\]"):
        clean(replace(table(PARITY), n_rows=100), NUMBER)


def test_a_table_of_objects_becomes_a_json_task_with_a_schema_and_a_folder_that_loads(tmp_path: Path) -> None:
    objects = [{"slots": {"n": n, "x": None}, "intent": ("on", "off")[n % 2]} for n in range(60)]
    rows = [{"input": f"i{n}", "target": value} for n, value in enumerate(objects)]
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"input": "bad", "target": "{"}\n')
    task = task_from_table("calls", read_table(path))
    assert task.answer.kind == "json"
    assert [note for note in task.notes if "not fit the schema" in note and "calls.jsonl:61" in note]
    properties = json.loads(task.answer.json_schema)["properties"]
    assert properties["intent"] == {"enum": ["off", "on"]}
    assert properties["slots"]["properties"] == {"n": {"type": "integer"}}  # a number; null is missing
    write_task(tmp_path / "calls", task)
    assert '"target": {"slots":{"n":' in (tmp_path / "calls" / "seed.jsonl").read_text()
    loaded = load_folder(tmp_path / "calls")
    assert (loaded.answer, loaded.seed, loaded.load_test()) == (task.answer, task.seed, task.load_test())
    assert loaded.sha256 == task.sha256


@pytest.mark.parametrize("targets", [['{"a": 1}', "x", "y"] * 20, ["[1]", "[2]"] * 20, ["{a}", "{b}"] * 20])
def test_other_texts_than_objects_are_no_json_task(targets: list[str]) -> None:
    assert infer_answer(table(targets).records).kind == "choice"

"""Identity, options, test split and warnings of a task."""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from arte_edge.errors import InputError
from arte_edge.tasks.folder import load_folder
from arte_edge.tasks.task import Answer, Example, listed_letters, quality_warnings


def test_the_key_of_an_example_is_its_content() -> None:
    assert Example("Is 4\n even?", "x").key == Example(" is 4 EVEN? ", "y").key
    assert Example("Is 4 even?", "x").key != Example("Is 5 even?", "x").key


def test_options_are_the_letters_in_the_input() -> None:
    text = "Which (A) one (B)?\nOptions:\n(A) circle\n(B) kite\n(C)square"
    assert Answer(kind="choice").options(text) == ("(A)", "(B)", "(C)")
    assert listed_letters("Pick (A) this or (B) that.") == ("(A)", "(B)")
    assert listed_letters("Vitamin (A) is good") == ()
    assert listed_letters("(B) one\n(C) two") == ()


def test_options_of_the_other_kinds_do_not_depend_on_the_input() -> None:
    assert Answer(kind="boolean").options("") == ("True", "False")
    assert Answer(kind="choice", choices=("yes", "no")).options("(A) x (B) y") == ("yes", "no")
    assert Answer(kind="number").options("1") == Answer(kind="text").options("1") == ()
    closed = [kind for kind in ("choice", "boolean", "number", "text") if Answer(kind=kind).closed]
    assert closed == ["choice", "boolean"]


@pytest.mark.parametrize("choices", [("on", "on "), ("only",), ("a", " "), ("a", "<ans>")])
def test_indistinct_choices_are_rejected(choices: tuple[str, ...]) -> None:
    for kind in ("choice", "number"):
        with pytest.raises(ValidationError):
            Answer.model_validate({"kind": kind, "choices": choices})


def test_only_load_test_gives_the_test_split(parity: Path) -> None:
    task = load_folder(parity)
    test = task.load_test()
    assert task.test_keys() == {example.key for example in test}
    held = repr(task) + repr([getattr(task, f.name) for f in dataclasses.fields(task) if f.name != "test_loader"])
    assert not any(example.input in held for example in test)


def test_a_test_split_that_changed_after_loading_is_rejected(
    parity: Path, write_jsonl: Callable[[Path, list[dict[str, object]]], Path]
) -> None:
    task = load_folder(parity)
    write_jsonl(parity / "test.jsonl", [{"input": "Is 99 even or odd?", "target": "odd"}])
    with pytest.raises(InputError, match="changed after the task was loaded"):
        task.load_test()


@pytest.mark.parametrize("file", ["task.toml", "seed.jsonl", "validation.jsonl", "test.jsonl"])
def test_the_identity_of_a_task_follows_its_content(parity: Path, file: str) -> None:
    before = load_folder(parity).sha256
    assert load_folder(parity).sha256 == before
    text = (parity / file).read_text(encoding="utf-8")
    (parity / file).write_text(text.replace("Is ", "Is it so that ").replace("Say", "Tell"), encoding="utf-8")
    assert load_folder(parity).sha256 != before


def test_small_and_unbalanced_splits_have_warnings(parity: Path) -> None:
    task = load_folder(parity)
    odd = tuple(row for row in task.validation if row.target == "odd")
    even = tuple(row for row in task.validation if row.target == "even")
    weak = replace(task, seed=even[:3], validation=odd * 4 + even, notes=("dropped 1 row",))
    parts = ("dropped 1 row", "50 rows", "no example of odd", "3 of 3 answers are even", "40 of 50 answers")
    for warning, part in zip(quality_warnings(weak), parts, strict=True):
        assert part in warning

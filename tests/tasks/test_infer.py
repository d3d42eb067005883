"""The answer kind of a table whose author did not say it."""

from __future__ import annotations

import pytest

from arte_edge.tasks.infer import infer_answer
from arte_edge.tasks.task import Answer


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


def test_one_broken_row_in_ten_makes_no_choice_of_letters() -> None:
    assert infer_answer(["(A)"] * 9 + ["Paris"]).choices != ()

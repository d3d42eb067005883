"""A text that stands under question after question must not reach the student, however it is written."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from arte_edge.distill.parrots import refuse_parrots


def row(question: str, text: str, usable: bool = True) -> dict[str, Any]:
    return {"question": question, "text": text, "usable": usable}


def test_a_text_under_three_of_a_few_questions_is_refused_everywhere() -> None:
    rows = [row(f"q{i}", "Make it warmer. <ans>warmer</ans>") for i in range(3)]
    rows.append(row("q0", "It is cold there. <ans>warmer</ans>"))
    assert refuse_parrots(rows) == 3
    assert [r["usable"] for r in rows] == [False, False, False, True]


def test_case_and_spaces_do_not_hide_a_parrot() -> None:
    rows = [row("a", "Make it  warmer."), row("b", "make it warmer."), row("c", " Make it warmer. ")]
    assert refuse_parrots(rows) == 3


def test_one_question_may_be_answered_alike_under_every_technique() -> None:
    rows = [row("a", "It is dark.") for _ in range(4)] + [row("b", "It is dark.")]
    assert refuse_parrots(rows) == 0


def test_among_many_questions_a_twentieth_may_share_a_text() -> None:
    def rows(alike: int) -> list[dict[str, Any]]:
        return [row(f"q{i}", "Same." if i < alike else f"Own {i}.") for i in range(100)]

    assert refuse_parrots(rows(5)) == 0
    assert refuse_parrots(rows(6)) == 6


def test_what_was_refused_before_is_not_counted_again_but_still_tells() -> None:
    rows = [row("a", "Same.", usable=False), row("b", "Same."), row("c", "Same.")]
    assert refuse_parrots(rows) == 2


@given(st.lists(st.tuples(st.integers(0, 8), st.sampled_from("abcd"), st.booleans()), max_size=40))
def test_never_makes_a_row_usable_and_counts_what_it_changed(drawn: list[tuple[int, str, bool]]) -> None:
    rows = [row(str(question), text, usable) for question, text, usable in drawn]
    before = [r["usable"] for r in rows]
    refused = refuse_parrots(rows)
    after = [r["usable"] for r in rows]
    assert all(was or not now for was, now in zip(before, after, strict=True))
    assert sum(before) - sum(after) == refused
    assert refuse_parrots(rows) == 0

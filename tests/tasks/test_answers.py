"""Reading answers out of what models write, and judging them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.tasks.answers import canonical, comparable, extract, matches
from arte_edge.tasks.task import Answer

LETTERS = Answer(kind="choice")
LABELS = Answer(kind="choice", choices=("light_on", "light_off", "Timer"))
BOOLEAN = Answer(kind="boolean")
NUMBER = Answer(kind="number")
TEXT = Answer(kind="text")
KINDS = st.sampled_from([LETTERS, LABELS, BOOLEAN, NUMBER, TEXT])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So it is <ans>4</ans>", "4"),
        ("<ans>3</ans> no, wait: <ans>4</ans> .", "4"),
        ("<ANS>\n4\n</ANS>", "4"),
        ("so <ans> perhaps <ans>4</ans>", "4"),
        ("<ans>4</ans> and then <ans>5", "4"),
    ],
)
def test_the_last_complete_tag_holds_the_answer(text: str, answer: str) -> None:
    assert extract(text, NUMBER) == answer


@pytest.mark.parametrize(
    "text", ["", "4", "<ans>4", "<ans>4</an", "4</ans>", "<ans></ans>", "<ans>4</ans><ans>?</ans>"]
)
def test_without_a_complete_readable_tag_there_is_no_answer(text: str) -> None:
    assert extract(text, NUMBER) is None


@pytest.mark.parametrize(
    "text", ["(B)", "b", "B.", "b)", "( b )", "**B**", '"(B)"', "(B) circle", "B: circle", "B) a (C)"]
)
def test_an_option_is_named_by_its_letter(text: str) -> None:
    assert canonical(text, LETTERS) == "(B)"


@pytest.mark.parametrize("text", ["", "A dog", "apple", "(AB)", "A, B", "A or B", "é", "1", "option A"])
def test_what_only_looks_like_a_letter_is_no_option(text: str) -> None:
    assert canonical(text, LETTERS) is None


def test_a_label_is_returned_as_the_task_spells_it() -> None:
    assert canonical("Light-Off.", LABELS) == "light_off"
    assert canonical("TIMER", LABELS) == "Timer"
    assert canonical("light", LABELS) is None
    assert canonical("light_on or light_off", LABELS) is None


def test_truth_is_said_in_four_words() -> None:
    said = {
        word: canonical(word, BOOLEAN) for word in ("true.", "YES", "False!", "no", "not false", "it is True")
    }
    assert said == {
        "true.": "True",
        "YES": "True",
        "False!": "False",
        "no": "False",
        "not false": None,
        "it is True": None,
    }


def test_free_text_is_shown_as_written_and_compared_without_case() -> None:
    assert extract("<ans> 'Paris'. </ans>", TEXT) == "Paris"
    assert comparable("'PARIS'.", TEXT) == "paris"
    assert matches("light_on( Kitchen )", "light_on(kitchen)", TEXT)
    assert not matches("light_on(office)", "light_on(kitchen)", TEXT)
    assert extract("<ans>...</ans>", TEXT) is None


def test_an_unreadable_answer_is_never_right() -> None:
    assert not matches(None, "4", NUMBER)
    assert not matches("many", "many", NUMBER)


@given(st.text(), KINDS)
def test_a_canonical_answer_is_its_own_canonical_form(text: str, answer: Answer) -> None:
    form = canonical(text, answer)
    if form is not None:
        assert canonical(form, answer) == form
        assert matches(form, form, answer) == (comparable(form, answer) is not None)


@given(st.text(), st.text(alphabet=st.characters(exclude_characters="<")), KINDS)
def test_what_stands_before_the_tag_does_not_matter(before: str, inside: str, answer: Answer) -> None:
    assert extract(f"{before} <ans>{inside}</ans>", answer) == canonical(inside, answer)


@given(st.text(), st.text(), KINDS)
def test_matching_does_not_depend_on_who_is_the_target(a: str, b: str, answer: Answer) -> None:
    assert matches(a, b, answer) == matches(b, a, answer)


@given(st.text(), KINDS)
def test_a_closed_answer_comes_from_the_set(text: str, answer: Answer) -> None:
    form = canonical(text, answer)
    if form is not None and answer.closed and not answer.letters:
        assert form in answer.options(text)

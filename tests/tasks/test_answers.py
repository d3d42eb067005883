"""Extracting answers from the output of models, and comparing them."""

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
def test_letters_of_options(text: str) -> None:
    assert canonical(text, LETTERS) == "(B)"


@pytest.mark.parametrize("text", ["", "A dog", "apple", "(AB)", "A, B", "A or B", "é", "1", "option A"])
def test_other_texts_are_not_an_option(text: str) -> None:
    assert canonical(text, LETTERS) is None


def test_a_label_has_the_task_s_spelling() -> None:
    assert canonical("Light-Off.", LABELS) == "light_off"
    assert canonical("TIMER", LABELS) == "Timer"
    assert canonical("light", LABELS) is None
    assert canonical("light_on or light_off", LABELS) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("true.", "True"), ("YES", "True"), ("(False)!", "False"), ("no", "False")),
        *(("not false", None), ("it is True", None)),
    ],
)
def test_booleans(text: str, value: str | None) -> None:
    assert canonical(text, BOOLEAN) == value


def test_free_text_keeps_its_case_and_is_compared_without() -> None:
    assert extract("<ans> 'Paris'. </ans>", TEXT) == "Paris"
    assert comparable("'PARIS'.", TEXT) == "paris"
    assert matches("light_on( Kitchen )", "light_on(kitchen)", TEXT)
    assert not matches("light_on(office)", "light_on(kitchen)", TEXT)
    assert extract("<ans>...</ans>", TEXT) is None


def test_an_unreadable_answer_is_never_correct() -> None:
    assert not matches(None, "4", NUMBER)
    assert not matches("many", "many", NUMBER)


@given(st.text(), KINDS)
def test_a_canonical_answer_is_its_own_canonical_form(text: str, answer: Answer) -> None:
    form = canonical(text, answer)
    if form is not None:
        assert canonical(form, answer) == form
        assert matches(form, form, answer) == (comparable(form, answer) is not None)


@given(st.text(), st.text(alphabet=st.characters(exclude_characters="<")), KINDS)
def test_text_before_the_tag_does_not_matter(before: str, inside: str, answer: Answer) -> None:
    assert extract(f"{before} <ans>{inside}</ans>", answer) == canonical(inside, answer)


@given(st.text(), st.text(), KINDS)
def test_matching_is_symmetric(a: str, b: str, answer: Answer) -> None:
    assert matches(a, b, answer) == matches(b, a, answer)


@given(st.text(), KINDS)
def test_a_closed_answer_comes_from_the_set(text: str, answer: Answer) -> None:
    form = canonical(text, answer)
    if form is not None and answer.closed and not answer.letters:
        assert form in answer.options(text)

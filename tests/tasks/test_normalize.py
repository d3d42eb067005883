"""Normal forms of text and numbers."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.tasks.normalize import WORDS, canonical_number, fold_label, fold_text, tidy_text


@pytest.mark.parametrize("text", ["light_on", "Light on", '"light-on".', "LIGHT  ON!", "ｌｉｇｈｔ on"])
def test_labels_are_compared_by_letters_and_digits(text: str) -> None:
    assert fold_label(text) == "light on"


def test_free_texts_are_compared_without_case_forms_and_blanks() -> None:
    assert fold_text("  “Ｓet_heat( Bedroom,21 )”.") == fold_text("set_heat(bedroom, 21)")
    assert fold_text("> ]") == fold_text(">]")
    assert fold_text("barn damp") != fold_text("barndamp")
    assert fold_text("barn, damp") != fold_text("barn damp")


def test_tidying_keeps_case_and_brackets() -> None:
    assert tidy_text(" 'Paris,\n France' ") == "Paris, France"
    assert tidy_text(") ]") == ") ]"


@given(st.text())
def test_normal_forms_are_stable(text: str) -> None:
    assert tidy_text(tidy_text(text)) == tidy_text(text)
    assert fold_text(fold_text(text)) == fold_text(text)
    assert fold_label(fold_label(text)) == fold_label(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("4.", "4"), ("1,234", "1234"), ("1,234.50", "1234.5"), ("-$5", "-5"), ("−35", "-35")),
        *(("minus four", "-4"), ("4 apples", "4"), ("5 m2", "5"), ("12kg", "12"), ("5%", "5"), ("-0", "0")),
        *(("**5**", "5"), ("5 (five)", "5"), ("1e3", "1000"), (".5", "0.5"), ("007", "7"), ("= 8", "8")),
    ],
)
def test_numbers_in_common_spellings(text: str, number: str) -> None:
    assert canonical_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        *("", "none", "v2", "the answer", "²x3"),
        *("2 + 3 = 5", "3,5", "5-6", "10:30", "1.2.3", "1,23", "2x3", "½"),
        *("twenty-one", "one hundred", "2 million", "two thirds", "3 dozen"),
    ],
)
def test_a_text_without_one_number_gives_none(text: str) -> None:
    assert canonical_number(text) is None


@pytest.mark.parametrize(("value", "word"), list(enumerate(WORDS)))
def test_number_words_up_to_twenty_are_numbers(value: int, word: str) -> None:
    assert canonical_number(f"{word.title()} things") == str(value)


@given(st.integers(), st.sampled_from(["{}", "{}.", " {} ", "{} units", "${}", "({})", "{:,}", "= {:,}."]))
def test_every_integer_survives_its_spellings(value: int, spelling: str) -> None:
    assert canonical_number(spelling.format(value)) == str(value)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4))
def test_a_decimal_keeps_its_value(value: Decimal) -> None:
    form = canonical_number(format(value, "f"))
    assert form is not None
    assert Decimal(form) == value


@given(st.text())
def test_any_text_gives_none_or_a_canonical_number(text: str) -> None:
    form = canonical_number(text)
    if form is not None:
        assert canonical_number(form) == form
        Decimal(form)

"""Normal forms: what two texts may differ in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.tasks.normal import fold_label, fold_text, tidy_text


@pytest.mark.parametrize("text", ["light_on", "Light on", '"light-on".', "LIGHT  ON!", "ｌｉｇｈｔ on"])
def test_labels_differ_in_letters_and_digits_only(text: str) -> None:
    assert fold_label(text) == "light on"


def test_texts_differ_in_case_forms_blanks_and_edges_only() -> None:
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

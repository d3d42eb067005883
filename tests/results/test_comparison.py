"""The closing table: its order, its signs, and what its first line says."""

from typing import Any

import pytest

from arte_edge.results.comparison import comparison_of, headline, upgraded


def summary(low: float = 0.1, high: float = 0.3) -> dict[str, Any]:
    places = [("own labels", "as asked"), ("base student", "as asked"), ("tuned student", "as asked")]
    places += [("base student", "constrained"), ("teacher", "8-shot")]
    share = {"n": 10, "right": 5, "accuracy": 0.5, "low": 0.2, "high": 0.8}
    test = {"gained": 3, "lost": 1, "difference": (low + high) / 2, "low": low, "high": high, "p_value": 0.01}
    return {
        "rows": [{"model": model, "setting": setting, **share} for model, setting in places],
        "paired": [{"against": m, "setting": s, **test} for m, s in places if m != "tuned student"],
        "partial": True,
    }


def test_rows_come_in_the_order_in_which_they_are_compared() -> None:
    rows = comparison_of(summary())
    names = [f"{row.model}, {row.setting}" for row in rows]
    assert names == [
        "base student, as asked",
        "own labels, as asked",
        "tuned student, as asked",
        "teacher, 8-shot",
        "base student, constrained",
    ]
    assert [row.difference_points for row in rows[:3]] == ["+20.0 (+10.0 to +30.0)"] * 2 + ["–"]
    assert all(row.partial for row in rows)


@pytest.mark.parametrize(
    ("low", "high", "first"), [(0.1, 0.3, "Better"), (-0.1, 0.3, "Not better"), (-0.3, -0.1, "Worse")]
)
def test_the_headline_says_what_the_interval_allows(low: float, high: float, first: str) -> None:
    line = headline(summary(low, high))
    assert line.startswith(f"{first} than your own labels alone: ")
    assert ("rounds = 2" in line) == (first != "Better")
    assert headline(summary() | {"paired": []}) == "Not compared with a student of your own labels."


def test_an_evaluation_of_an_older_version_is_upgraded_and_a_damaged_one_is_said() -> None:
    new = summary()
    test = {key: value for key, value in new["paired"][1].items() if key not in ("against", "setting")}
    old = upgraded(new | {"paired": {"as asked": test}})
    rows = {(row.model, row.setting): row.difference for row in comparison_of(old)}
    assert rows["base student", "as asked"] == pytest.approx(0.2) and rows["own labels", "as asked"] is None
    assert upgraded(new) == new and upgraded("damaged") == "damaged"
    with pytest.raises(ValueError, match="no evaluation"):
        comparison_of({"rows": [{}], "paired": []})

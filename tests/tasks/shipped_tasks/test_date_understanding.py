"""Dates: the right option is right, there is one of it, and it cannot be told by looks."""

import re
from datetime import date, datetime, timedelta

from shipped_tasks.date_understanding import generate

ROWS = [row for rows in generate().values() for row in rows]
DAYS = {"today": 0, "tomorrow": 1, "yesterday": -1, "one week ago": -7, "10 days ago": -10}


def options(text: str) -> dict[str, date]:
    found = re.findall(r"^(\([A-D]\)) (\d\d/\d\d/\d{4})$", text, re.MULTILINE)
    return {letter: datetime.strptime(day, "%m/%d/%Y").date() for letter, day in found}


def test_each_input_lists_four_different_dates() -> None:
    for row in ROWS:
        assert len(set(options(row.input).values())) == 4, row
        assert row.target in options(row.input)


def test_the_target_is_the_date_that_is_asked_for() -> None:
    checked = 0
    for row in ROWS:
        stated = re.match(r"(Today|Yesterday|Tomorrow) (?:is|was) (\w+ \d+, \d+)\. What is the date (.+) in", row.input)
        if stated and stated[3] in DAYS:
            shift = {"Today": 0, "Yesterday": 1, "Tomorrow": -1}[stated[1]] + DAYS[stated[3]]
            right = datetime.strptime(stated[2], "%B %d, %Y").date() + timedelta(days=shift)
            assert options(row.input)[row.target] == right, row
            checked += 1
    assert checked > 20


def test_the_right_option_is_not_the_one_that_the_others_resemble() -> None:
    hits = 0.0
    for row in ROWS:
        days = options(row.input)
        parts = {letter: {("y", d.year), ("m", d.month), ("d", d.day)} for letter, d in days.items()}
        likeness = {a: sum(len(parts[a] & parts[b]) for b in parts if b != a) for a in parts}
        best = [letter for letter in likeness if likeness[letter] == max(likeness.values())]
        hits += (row.target in best) / len(best)
    assert hits / len(ROWS) < 0.33  # 0.25 by chance

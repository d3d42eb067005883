"""Dates to be inferred from statements about other days, as a choice of four options.

The wrong options are the answer to another question about the same day, and both answers with the same
mistake. If all wrong options were close to the correct one, it could be recognized without the question.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta

from arte_edge.tasks.task import Example
from shipped_tasks.draw import Draw, fill

__all__ = ["SEED", "generate"]

SEED = 1752
_LETTERS = ("(A)", "(B)", "(C)", "(D)")
_YEARS = (1985, 2029)
_NAMES = (*("Amara", "Bruno", "Chen", "Dalia", "Emil", "Freya", "Hugo", "Imani", "Jonas", "Leila"), *("Noor", "Petra"))
_FEASTS = (
    ("New Year's Day", 1, 1),
    ("Valentine's Day", 2, 14),
    ("Halloween", 10, 31),
    ("Christmas Eve", 12, 24),
    ("Christmas Day", 12, 25),
    ("New Year's Eve", 12, 31),
    ("the last day of January", 1, 31),
    ("the first day of March", 3, 1),
    ("the last day of June", 6, 30),
    ("the first day of September", 9, 1),
)
_DAY_STEPS = {
    "today": 0,
    "tomorrow": 1,
    "yesterday": -1,
    "24 hours from now": 1,
    "one week ago": -7,
    "one week from today": 7,
    "two weeks from today": 14,
    "10 days ago": -10,
    "3 days from now": 3,
}
_MONTH_STEPS = {"a month ago": -1, "one month from today": 1, "one year ago": -12, "one year from today": 12}


def generate() -> dict[str, list[Example]]:
    """Return the three splits."""
    draw = Draw(SEED)

    def make(label: str) -> tuple[str, Example]:
        fact, today = _fact(draw)
        when, right = _question(draw, today)
        stem = f"{fact} What is the date {when} in MM/DD/YYYY?"
        options = _wrong(draw, today, right)
        options.insert(_LETTERS.index(label), right)
        listed = "\n".join(f"{letter} {_us(day)}" for letter, day in zip(_LETTERS, options, strict=True))
        return stem, Example(f"{stem}\nOptions:\n{listed}", label)

    return fill(make, _LETTERS, draw)


def _us(day: date) -> str:
    return day.strftime("%m/%d/%Y")


def _long(day: date) -> str:
    return f"{_MONTHS[day.month - 1]} {day.day}, {day.year}"


# Not strftime("%B"): that follows the locale.
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def _days(n: int) -> timedelta:
    return timedelta(days=n)


def _months_later(day: date, n: int) -> date:
    """Return the same day `n` months later; the 29th to 31st never come here."""
    months = day.year * 12 + day.month - 1 + n
    return date(months // 12, months % 12 + 1, min(day.day, 28))


def _fact(draw: Draw) -> tuple[str, date]:
    """Return a sentence that fixes which day today is, and that day."""
    today = date(draw.integer(*_YEARS), 1, 1) + _days(draw.integer(0, 364))
    n, name = draw.integer(2, 9), draw.pick(_NAMES)
    years = draw.integer(20, 60)

    def birthday() -> tuple[str, date]:
        day = _months_later(today, 0)
        return f"{name} was born on {_long(_months_later(day, -12 * years))} and turns {years} today.", day

    def feast() -> tuple[str, date]:
        label, month, day = draw.pick(_FEASTS)
        return f"Today is {label} in {today.year}.", date(today.year, month, day)

    facts: tuple[Callable[[], tuple[str, date]], ...] = (
        lambda: (f"Today is {_long(today)}.", today),
        lambda: (f"Yesterday was {_long(today - _days(1))}.", today),
        lambda: (f"Tomorrow is {_long(today + _days(1))}.", today),
        lambda: (f"It was {_long(today - _days(n))} {n} days ago.", today),
        lambda: (f"It will be {_long(today + _days(n))} in {n} days.", today),
        lambda: (f"The day after tomorrow is {_long(today + _days(2))}.", today),
        lambda: (f"{name}'s parcel was due on {_long(today - _days(n))}, but it came today, {n} days late.", today),
        lambda: (f"{name}'s exam was set for {_long(today + _days(n))}, but it is held today, {n} days early.", today),
        lambda: (f"{name} borrowed a book exactly two weeks ago, on {_long(today - _days(14))}.", today),
        lambda: (f"{name}'s wall calendar still shows {_long(today - _days(1))}, which was yesterday.", today),
        lambda: (f"{name}, who writes the day before the month, dated a letter {today:%d/%m/%Y} this morning.", today),
        birthday,
        feast,
    )
    return draw.pick(facts)()


def _question(draw: Draw, today: date) -> tuple[str, date]:
    """Return which day is asked for, in words, and the right date."""
    if today.day <= 28 and draw.chance(0.3):
        when = draw.pick(tuple(_MONTH_STEPS))
        return when, _months_later(today, _MONTH_STEPS[when])
    when = draw.pick(tuple(_DAY_STEPS))
    return when, today + _days(_DAY_STEPS[when])


def _wrong(draw: Draw, today: date, right: date) -> list[date]:
    """Return three wrong dates, see the module's docstring."""
    others = [today + _days(step) for step in _DAY_STEPS.values()]
    others += [_months_later(today, step) for step in _MONTH_STEPS.values()]
    while True:
        other = draw.pick(others)
        slip = draw.pick(_SLIPS)
        wrong = [other, slip(right), slip(other)]
        if len({right, *wrong}) == 4:
            return draw.shuffled(wrong)


def _swapped(day: date) -> date:
    """Return the date that is read when day and month change places, if there is one."""
    return date(day.year, day.day, day.month) if day.day <= 12 else day


# Ways to be wrong by one mistake. Each has its opposite, so that of two options that differ
# by a slip neither looks like the mistake.
_SLIPS: tuple[Callable[[date], date], ...] = (
    lambda day: day + _days(1),
    lambda day: day - _days(1),
    lambda day: day + _days(2),
    lambda day: day - _days(2),
    lambda day: _months_later(day, 1),
    lambda day: _months_later(day, -1),
    lambda day: _months_later(day, 12),
    lambda day: _months_later(day, -12),
    _swapped,
)

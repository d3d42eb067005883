"""One check of the gate, and the table of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table

from arte_edge.console import ResultTable

_SHORT = 64  # characters of a note that fit into the table, on two lines


@dataclass(frozen=True)
class Check:
    """A measured value and its threshold; None: reported only.

    `note` is one sentence: the most likely cause for a check that fails, else details or empty.
    """

    name: str
    measured: float | None
    threshold: float | None
    passed: bool
    note: str = ""
    bound: Literal["at most", "at least"] = "at most"


def checks_table(checks: Sequence[Check]) -> Table:
    """Return the checks as a table of 80 columns; long notes are in `long_notes`."""
    from rich.text import Text

    table = ResultTable(box=None, pad_edge=False)
    for title in ("check", "measured", "limit", "", ""):
        number = title in ("measured", "limit")
        table.add_column(title, justify="right" if number else "left", no_wrap=bool(title))
    for check in checks:
        state = "FAILED" if not check.passed else "-" if check.threshold is None else "ok"
        style = "bold red" if not check.passed else ""
        note = check.note if check.passed and len(check.note) <= _SHORT else "see below"
        measured = "" if check.measured is None else _formatted(check.name, check.measured)
        limit = ""
        if check.threshold is not None:
            sign = "≥" if check.bound == "at least" else "≤"
            limit = f"{sign} {_formatted(check.name, check.threshold)}"
        table.add_row(check.name, measured, limit, Text(state, style=style), Text(note))
    return table


def long_notes(checks: Sequence[Check]) -> list[str]:
    """Return the notes that do not fit into the table; failed checks last."""
    passed = [check for check in checks if check.passed and len(check.note) > _SHORT]
    notes = [f"{check.name} (passed): {check.note}" for check in passed]
    return notes + [f"{check.name}: {check.note}" for check in checks if not check.passed]


def _formatted(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    if name.startswith("kl"):
        return f"{value:.2g}" if value < 0.01 else f"{value:.3f}"
    if name == "perplexity ratio":
        return f"{value:.4f}"
    if name == "accuracy drop":
        return f"{value:.1%}".replace("-0.0%", "0.0%")
    return f"{value:.1%}" if name.startswith("top-1") else f"{value:.0f}"

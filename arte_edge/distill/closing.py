"""The last words of a run: a table that a person understands, and where the student lies."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from arte_edge.distill.run import Summary

__all__ = ["closing_table", "show_closing"]


def closing_table(evaluation: Summary) -> Table:
    """Return accuracy by model and setting, with 95 % intervals."""
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name, side in (("model", "left"), ("asked", "left"), ("right", "right"), ("95 % interval", "right")):
        table.add_column(name, justify="left" if side == "left" else "right", no_wrap=True)
    for row in evaluation["rows"]:
        table.add_row(
            row["model"],
            row["setting"],
            f"{row['accuracy']:.1%}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            style="bold" if row["model"] == "tuned student" else "",
        )
    return table


def show_closing(console: Console, evaluation: Summary, folder: Path, calls: tuple[int, int]) -> None:
    """Print the table, the paired test in words, what share is format, and the paths."""
    n = evaluation["rows"][0]["n"]
    part = ", a part of the test split: for a look only" if evaluation["partial"] else ""
    lines = [f"n = {n} test examples{part}; always guessing gives {evaluation['chance']:.1%}."]
    for setting, test in evaluation["paired"].items():
        lines.append(
            f"{setting}: {test['difference']:+.1%} ({test['low']:+.1%} to {test['high']:+.1%}), "
            f"{test['gained']} gained, {test['lost']} lost, p = {test['p_value']:.2g}."
        )
    share = evaluation["format_share"]
    if share is not None:
        lines.append(
            f"Of the first gain {share:.0%} is format: what the base student gains when its answer is forced."
        )
    lines += [
        "",
        f"The student: {folder / 'tune' / 'student'}",
        f"Everything of this run: {folder} ({calls[0]} engine calls made, {calls[1]} kept)",
    ]
    console.print(Group(closing_table(evaluation), Text("\n".join(lines))), soft_wrap=True)

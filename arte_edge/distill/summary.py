"""The summary at the end of a run: accuracy by model and prompting, the paired test, and the paths."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.text import Text

from arte_edge.distill.run_context import Summary
from arte_edge.notebook import ResultTable

__all__ = ["show_summary", "summary_lines", "summary_table"]

# Names in run folders of earlier versions.
_OLD_PROMPTING = {"answer forced": "constrained"}


def summary_table(evaluation: Summary) -> ResultTable:
    """Return accuracy by model and setting, with 95 % intervals."""
    table = ResultTable(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name, side in (
        ("model", "left"),
        ("prompting", "left"),
        ("right", "right"),
        ("95 % interval", "right"),
    ):
        table.add_column(name, justify="left" if side == "left" else "right", no_wrap=True)
    for row in evaluation["rows"]:
        table.add_row(
            row["model"],
            _OLD_PROMPTING.get(row["setting"], row["setting"].replace(" worked", "-shot")),
            f"{row['accuracy']:.1%}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            style="bold" if row["model"] == "tuned student" else "",
        )
    return table


def summary_lines(evaluation: Summary) -> list[str]:
    """Return the text below the table: n, the paired tests, and the share of the gain that is format."""
    n = evaluation["rows"][0]["n"]
    part = ", a part of the test split: not a result" if evaluation["partial"] else ""
    lines = [f"n = {n} test examples{part}; the random baseline is {evaluation['chance']:.1%}."]
    for setting, test in evaluation["paired"].items():
        lines.append(
            f"{_OLD_PROMPTING.get(setting, setting)}: {test['difference']:+.1%} "
            f"({test['low']:+.1%} to {test['high']:+.1%}), "
            f"{test['gained']} gained, {test['lost']} lost, p = {test['p_value']:.2g}."
        )
    share = evaluation["format_share"]
    if share is not None:
        lines.append(
            f"{share:.0%} of the first gain is format: "
            "what the base student gains from constrained answers alone."
        )
    return lines


def show_summary(console: Console, evaluation: Summary, folder: Path, calls: tuple[int, int]) -> None:
    """Print the table, the text below it, and the paths."""
    lines = [
        *summary_lines(evaluation),
        "",
        f"Student: {folder / 'tune' / 'student'}",
        f"Run folder: {folder} ({calls[0]} engine calls made, {calls[1]} cached)",
    ]
    console.print(Group(summary_table(evaluation), Text("\n".join(lines))), soft_wrap=True)

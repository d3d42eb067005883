"""A recommendation as a table and lines of text: the same for the terminal and for notebooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from arte_edge.publish.recommend.constraints import size_text

if TYPE_CHECKING:
    from rich.table import Table

    from arte_edge.publish.recommend.pareto import Candidate, Metric
    from arte_edge.publish.recommend.pick import Recommendation
    from arte_edge.results.accuracy import PairedAccuracy

__all__ = ["choice_lines", "drop_text", "recommendation_lines", "recommendation_table"]

_DASH = "–"


def recommendation_lines(found: Recommendation) -> list[str]:
    """Return why files are excluded, and notes."""
    lines = []
    for one in found.violations:
        option = "" if one.constraint == "gate" else f" (--{one.constraint.replace('_', '-')})"
        lines.append(f"{short_name(found, one.file)} is excluded{option}: {one.reason}")
    return [*lines, *found.notes]


def choice_lines(found: Recommendation) -> list[str]:
    """Return the choice and the reason for it; without a choice what to relax."""
    if found.pick is None:
        return [found.why, found.hint]
    accuracy = found.candidate(found.pick).accuracy
    against = f" Against the 16-bit student: {drop_text(accuracy)}." if accuracy else ""
    return [f"Use {Path(found.pick).name}.", found.why + against]


def recommendation_table(found: Recommendation) -> Table:
    """Return the files with what is known of each; predicted values are marked ~."""
    from rich import box

    from arte_edge.notebook import ResultTable

    table = ResultTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("file", overflow="fold", min_width=12)
    for name in ("size", "memory", "tokens/s", "answer", "accuracy", "drop"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    excluded = {one.file for one in found.violations}
    for c in found.candidates:
        mark = "pick" if c.file == found.pick else "excluded" if c.file in excluded else ""
        front = "*" if c.file in found.front.files else ""
        table.add_row(
            short_name(found, c.file) + front,
            size_text(c.artifact.size_bytes),
            _cell(c.ram, size_text),
            _cell(c.decode, lambda v: f"{v:.1f}"),
            _cell(c.answer_s, lambda v: f"{v:.1f} s"),
            _accuracy(c),
            _drop(c),
            mark,
        )
    axes = ", ".join(found.front.axes)
    table.caption = f"* on the Pareto front of {axes}: no other file is better in one and as good in the rest"
    table.caption_justify = "left"
    return table


def short_name(found: Recommendation, file: str) -> str:
    """Leave out what all the names begin with: the student's name."""
    return f"…{file.removeprefix(found.model)}" if file.startswith(found.model) else file


def _cell(metric: Metric | None, show: Callable[[float], str]) -> str:
    return _DASH if metric is None else f"{'~' if metric.predicted else ''}{show(metric.value)}"


def _accuracy(c: Candidate) -> str:
    a = c.accuracy
    return _DASH if a is None else f"{a.accuracy:.0%} ({100 * a.low:.0f}–{100 * a.high:.0f})"


def _drop(c: Candidate) -> str:
    difference = c.accuracy.difference if c.accuracy else None
    return _DASH if difference is None else f"{100 * difference:+.1f}"


def drop_text(accuracy: PairedAccuracy) -> str:
    """Return the paired difference from the 16-bit student in points, and whether it is significant."""
    if accuracy.difference is None:
        return "difference from the student not measured"
    points = 100 * accuracy.difference
    text = f"{-points:.1f} points lost" if points < 0 else f"{points:+.1f} points"
    if accuracy.difference_low is not None and accuracy.difference_high is not None:
        text += f" ({100 * accuracy.difference_low:+.1f} to {100 * accuracy.difference_high:+.1f}"
        text += "" if accuracy.p_value is None else f", p = {accuracy.p_value:.2g}"
        text += f", n = {accuracy.n})"
    if accuracy.p_value is not None and points:
        text += ", significant" if accuracy.significant else ", not significant"
    return text

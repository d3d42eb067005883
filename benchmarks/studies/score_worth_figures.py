"""The figures of benchmarks/results/score_worth/README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import write_svg
from score_worth_scores import Floats

from arte_edge.publish.report.charts import Axis, Plot

__all__ = ["ends_chart", "parrots_chart"]

_FIGURES = Path(__file__).parents[2] / "docs" / "figures"


def parrots_chart(share: Floats, right: Floats, name: str) -> None:
    """Draw what each trained student got right, writing, against the share of parroted drafts in its group."""
    plot = Plot(
        Axis("share of repeated rationales in the training group", 0.0, 1.02),
        Axis("generated accuracy, 240 fresh questions", 0.0, 0.4),
        title="Repeated rationales and what training on them does",
        desc=f"{len(share)} students, each trained on one group, by the group's share of repeated rationales.",
    )
    for x, written in zip(share.tolist(), right.tolist(), strict=True):
        plot.mark(x, written, 0, hollow=True)
    write_svg(plot, _FIGURES / f"score-parrots-{name}.svg")


def ends_chart(scores: Mapping[str, Any], die: Sequence[float], name: str) -> None:
    """Draw, for each score, its rank correlations with what training on one candidate and on groups of candidates does.

    `die`: how far, from and to, 95 % of random scores order the groups.
    """
    rows = list(scores)
    plot = Plot(
        Axis("rank correlation with what training does", -0.9, 0.9),
        rows,
        title="Preference scores against training",
        desc="Rank correlations with 95 % intervals, one row per score; lines: 95 % range of random scores.",
        legend=[("one candidate", 0), ("comparable groups, bias-free probability", 1)],
    )
    plot.rule(0.0, "")
    for end in die:
        plot.rule(end, "random")
    for i, key in enumerate(rows):
        spans = (scores[key]["one draft"]["all"], scores[key]["trained"]["groups alike, probability_free"])
        for series, span in enumerate(spans):
            y = i + (-0.16, 0.16)[series]
            plot.whisker((span[1], span[2]), (y, y), series)
            plot.mark(span[0], y, series, tip=f"{key}: {span[0]:+.2f} ({span[1]:+.2f} to {span[2]:+.2f})")
    write_svg(plot, _FIGURES / f"score-worth-{name}.svg")

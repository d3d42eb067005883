"""A run's closing table: each model on the test split, and the paired difference of the tuned student from it.

The summary of the stage `evaluate` holds it in the run folder; `comparison_of` makes the rows that travel with the
student's files. Runs before version 0.1 compared with the base student alone; `upgraded` gives theirs today's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from arte_edge.results.accuracy import Share, points_text

AS_ASKED = "as asked"
BASE, OWN, OWN_ALL = "base student", "own labels", "own labels + validation"
TUNED, TEACHER = "tuned student", "teacher"


class ComparisonRow(Share):
    """One model on the task's test split, and the difference of the tuned student from it on the same examples."""

    model: str = Field(description=f"{BASE}, {OWN} (the base trained on them alone), {OWN_ALL}, {TUNED}, {TEACHER}")
    setting: str = Field(description="prompting: as a user does it, constrained to the answers, or few-shot")
    difference: float | None = Field(
        default=None, description="accuracy of the tuned student minus this one, paired; null: it is the tuned student"
    )
    partial: bool = Field(default=False, description="only a part of the test split, for trying out")


def upgraded(summary: Any) -> Any:
    """Return the summary of an evaluation in today's shape: `paired` is a list. Anything else stays as it is."""
    paired = summary.get("paired") if isinstance(summary, dict) else None
    if not isinstance(paired, dict) or not all(isinstance(test, Mapping) for test in paired.values()):
        return summary
    tests = [{"against": BASE, "setting": setting, **test} for setting, test in paired.items()]
    return {"form": "reasoning-first", **summary, "paired": tests}


def comparison_of(summary: Mapping[str, Any]) -> tuple[ComparisonRow, ...]:
    """Return the rows of an evaluation's summary in the order of the closing table: each setting's models together.

    Raises ValueError: the summary lacks a key, or holds a value that none of the rows may have.
    """
    try:
        tests = {(test["against"], test["setting"]): test for test in summary["paired"]}
        known = [(row, tests.get((row["model"], row["setting"]))) for row in summary["rows"]]
        rows = [_row(row, test, bool(summary.get("partial"))) for row, test in known]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no evaluation: {error!r}") from error
    models = [BASE, OWN, OWN_ALL, TUNED, TEACHER]
    first = next((row.setting for row in rows if row.model == TUNED), AS_ASKED)
    # What was prompted alike comes first, and with it the teacher; then each further setting.
    settings = [first, AS_ASKED, *(row.setting for row in rows)]

    def place(row: ComparisonRow) -> tuple[int, int]:
        setting = first if row.model == TEACHER else row.setting
        return settings.index(setting), models.index(row.model) if row.model in models else len(models)

    return tuple(sorted(rows, key=place))


def headline(summary: Mapping[str, Any]) -> str:
    """Return the first line of a result: whether the student beats the one of the user's own labels."""
    test = next((test for test in summary["paired"] if test["against"] == OWN), None)
    if test is None:
        return "Not compared with a student of your own labels."
    points = points_text(test["difference"], test["low"], test["high"])
    by = f"than your own labels alone: {points} points, p = {test['p_value']:.2g}."
    if test["low"] > 0:
        return f"Better {by}"
    return (
        f"{'Worse' if test['high'] < 0 else 'Not better'} {by} Try more tailored data (tailor.questions), a round on "
        "errors (rounds = 2), or a stronger teacher; or ship the student of your own labels."
    )


def _row(row: Mapping[str, Any], test: Mapping[str, Any] | None, partial: bool) -> ComparisonRow:
    keys = ("model", "setting", "n", "right", "accuracy", "low", "high")
    known = {key: row[key] for key in keys} | {"partial": partial, "slot_f1": row.get("slot_f1")}
    if test is not None:
        known |= {"difference": test["difference"], "p_value": test["p_value"]}
        known |= {"difference_low": test["low"], "difference_high": test["high"]}
    return ComparisonRow.model_validate(known)

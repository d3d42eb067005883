"""The one record of an accuracy, with the paired difference from a reference on the same examples.

The fidelity gate, `arte-edge bench`, the model card, the report and the recommendation all use it.
A file that scores 80 % where the 16-bit student scores 82 % may have lost nothing: only the examples
on which the two disagree say whether the difference is more than chance, hence the exact McNemar test.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arte_edge.errors import InputError
from arte_edge.stats import mcnemar, wilson

# Of student.json and bench.jsonl. In version 1 `metrics` of a fidelity was `figures`, and the rows of a task had
# no accuracy, lost and gained.
SCHEMA_VERSION: Literal[2] = 2
_READABLE = (1, 2)
_SIGNIFICANT_P = 0.05
NOT_KNOWN = "–"  # in a table, in place of a number
# For each example: the first 16 hex digits of the sha256 of its input, the answer, whether it is correct.
Answers = tuple[tuple[str, str, bool], ...]


class Record(BaseModel):
    """A part of a results file: frozen, without undeclared keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, document: dict[str, Any], where: str, *, outdated: str, hint: str) -> Self:
        """Return the record in a document of a readable schema version.

        Raises InputError: another version, with the hint `outdated`; or a bad key, with `hint`.
        """
        if (version := document.get("schema_version")) not in _READABLE:
            readable = " and ".join(map(str, _READABLE))
            raise InputError(f"{where}: schema_version is {version}, this arte-edge reads {readable}", outdated)
        try:
            return cls.model_validate_json(json.dumps(document | {"schema_version": SCHEMA_VERSION}))
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise InputError(f"{where}: {key}: {problem['msg']}", hint) from error


class Share(Record):
    """Correct answers on examples of a task, and the paired difference from another model's on the same ones."""

    n: int = Field(ge=0, description="number of examples")
    right: int = Field(ge=0, description="correct answers")
    accuracy: float = Field(ge=0, le=1, description="right / n")
    low: float = Field(ge=0, le=1, description="95 % Wilson interval")
    high: float = Field(ge=0, le=1)
    slot_f1: float | None = Field(
        default=None, ge=0, le=1, description="of JSON answers: micro F1 over the values in them, each by its path"
    )
    difference: float | None = Field(default=None, description="accuracy minus that of the reference, paired")
    difference_low: float | None = Field(default=None, description="95 % interval of the difference")
    difference_high: float | None = None
    p_value: float | None = Field(default=None, description="exact McNemar test of the pairs")

    @property
    def percent(self) -> str:
        """The accuracy and its interval for a table: ``82% (74–88)``."""
        return f"{self.accuracy:.0%} ({100 * self.low:.0f}–{100 * self.high:.0f})"

    @property
    def with_slots(self) -> str:
        """The accuracy for a table, of JSON answers with the slot F1: ``82.0% (slot F1 91.3%)``."""
        return f"{self.accuracy:.1%}" + ("" if self.slot_f1 is None else f" (slot F1 {self.slot_f1:.1%})")

    @property
    def difference_points(self) -> str:
        """The difference in points with its interval, for a table: ``-5.0 (-9.1 to +1.2)``."""
        if self.difference is None:
            return NOT_KNOWN
        return points_text(self.difference, self.difference_low, self.difference_high)


def points_text(difference: float, low: float | None, high: float | None) -> str:
    """Return a difference in points with its interval, if there is one."""
    interval = "" if low is None or high is None else f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{100 * difference:+.1f}{interval}"


class PairedAccuracy(Share):
    """Correct answers of one model on examples of a task; where a reference answered them too, the difference."""

    task: str = Field(default="", description="name of the task; empty: the one the student was tuned for")
    split: str = Field(description="which examples: validation or test")
    reference: str = Field(default="", description="what the difference is paired with: the 16-bit student")
    reference_right: int | None = Field(default=None, description="its correct answers on the same examples")
    lost: int | None = Field(default=None, description="examples that only the reference got right")
    gained: int | None = Field(default=None, description="examples that only this model got right")

    @model_validator(mode="before")
    @classmethod
    def _derive_accuracy(cls, values: Any) -> Any:
        """Fill in the accuracy from the counts: rows of schema version 1 have the counts alone."""
        if isinstance(values, dict) and "accuracy" not in values:
            right, n = values.get("right"), values.get("n")
            if isinstance(right, int) and isinstance(n, int):
                return {**values, "accuracy": min(right / n, 1.0) if n > 0 and right > 0 else 0.0}
        return values

    @classmethod
    def of(cls, task: str, split: str, right: int, n: int, slot_f1: float | None = None) -> Self:
        """Return the accuracy of `right` correct answers out of `n`, with its interval and no reference."""
        low, high = wilson(right, n)
        share = right / n if n else 0.0
        return cls(task=task, split=split, n=n, right=right, accuracy=share, low=low, high=high, slot_f1=slot_f1)

    def paired_with(self, name: str, reference: Sequence[bool], answers: Sequence[bool]) -> Self:
        """Return this accuracy with the difference from `reference`, which got the same examples in the same order."""
        test = mcnemar(reference, answers)
        return self.model_copy(
            update={
                "reference": name,
                "reference_right": sum(map(bool, reference)),
                "lost": test.only_a,
                "gained": test.only_b,
                "difference": test.difference,
                "difference_low": test.low,
                "difference_high": test.high,
                "p_value": test.p_value,
            }
        )

    @property
    def reference_alone(self) -> PairedAccuracy | None:
        """The accuracy of the reference on the same examples; None without one."""
        if self.reference_right is None:
            return None
        return PairedAccuracy.of(self.task, self.split, self.reference_right, self.n)

    @property
    def significant(self) -> bool:
        """Whether the difference from the reference is more than chance explains (p < 0.05)."""
        return self.p_value is not None and self.p_value < _SIGNIFICANT_P


class DeviceAccuracy(PairedAccuracy):
    """An accuracy that `arte-edge bench` measured on a device."""

    runtime: str = ""
    test_time: str = Field(default="", description="when it was measured, ISO 8601, UTC")
    task_sha256: str = ""
    partial: bool = Field(default=False, description="--limit: only a part of the split, for trying out")
    with_grammar: PairedAccuracy | None = Field(
        default=None, description="constrained to the task's grammar, paired with the same answers without it"
    )
    answer_seconds_p50: float | None = Field(default=None, description="from the prompt to the last token")
    answer_seconds_p95: float | None = None
    contended: bool | None = Field(default=None, description="other work held the cores: true of the times")


def paired_on_common(
    name_a: str, a: Answers, name_b: str, b: Answers, *, task: str = "", split: str = ""
) -> PairedAccuracy:
    """Return the accuracy of b with a as its reference, on the examples that both answered.

    Examples are matched by the hash of their input, so the two may have been measured on different
    machines at different times.

    Raises InputError: they have no example in common.
    """
    first = {key: right for key, _, right in a}
    common = [(first[key], right) for key, _, right in b if key in first]
    if not common:
        raise InputError(
            f"{name_a} and {name_b} have no example in common", "Measure both on the same split of the same task."
        )
    reference, answers = zip(*common, strict=True)
    accuracy = PairedAccuracy.of(task, split, sum(answers), len(answers))
    return accuracy.paired_with(name_a, reference, answers)

"""Two systems on the same examples: the paired difference of their right answers.

An example is known by a hash of its input, so the two may have answered on different machines and
at different times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arte_edge.bench.result import QualityRow
from arte_edge.distill.stats import mcnemar
from arte_edge.errors import InputError

__all__ = ["Answers", "Pair", "pair", "paired"]

Answers = tuple[tuple[str, str, bool], ...]  # as in `QualityRow.answers`


@dataclass(frozen=True)
class Pair:
    """Two systems on the examples that both answered; shares from 0 to 1, b minus a."""

    reference: str
    n: int
    reference_right: int
    difference: float
    low: float
    high: float
    p_value: float

    def fields(self) -> dict[str, Any]:
        """Return them as the fields of a `QualityRow`."""
        return {
            "reference": self.reference,
            "reference_right": self.reference_right,
            "difference": self.difference,
            "difference_low": self.low,
            "difference_high": self.high,
            "p_value": self.p_value,
        }


def pair(a: QualityRow, b: QualityRow) -> Pair:
    """Compare two rows; see `paired`."""
    return paired(a.model_filename, a.answers, b.model_filename, b.answers)


def paired(name_a: str, a: Answers, name_b: str, b: Answers) -> Pair:
    """Compare b with a on the examples that both answered (exact McNemar test, paired 95 % interval).

    Raises:
        InputError: they have no example in common.
    """
    first = {key: right for key, _, right in a}
    shared = [(first[key], right) for key, _, right in b if key in first]
    if not shared:
        raise InputError(
            f"{name_a} and {name_b} answered no example in common",
            "Measure both on the same split of the same task.",
        )
    test = mcnemar([x for x, _ in shared], [y for _, y in shared])
    right = sum(x for x, _ in shared)
    return Pair(name_a, test.n, right, test.difference, test.low, test.high, test.p_value)

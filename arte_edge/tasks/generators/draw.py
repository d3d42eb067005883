"""Draws that repeat byte for byte, and the filling of splits with balanced, distinct rows.

Of Python's generator only `random()` is promised to give the same sequence in every
version, so every draw here is made from it: the committed data must come out the same
on the interpreter of ten years from now.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from arte_edge.tasks.task import SPLITS, Example, content_key

__all__ = ["SIZES", "Draw", "fill", "quotas"]

SIZES = {"seed": 40, "validation": 100, "test": 200}
_MAX_TRIES = 200_000

T = TypeVar("T")


class Draw:
    """A seeded source of choices."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def integer(self, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        keyed = [(self._random(), index) for index in range(len(options))]
        return [options[index] for _, index in sorted(keyed)]

    def sample(self, options: Sequence[T], n: int) -> list[T]:
        """Return `n` different options in random order."""
        return self.shuffled(options)[:n]


def quotas(labels: Sequence[T], n_rows: int) -> dict[T, int]:
    """Share `n_rows` among `labels` as evenly as they go; the first labels take what is left over."""
    share, rest = divmod(n_rows, len(labels))
    return {label: share + (index < rest) for index, label in enumerate(labels)}


def fill(
    make: Callable[[str], tuple[str, Example]], labels: Sequence[str], draw: Draw
) -> dict[str, list[Example]]:
    """Fill the three splits with rows from ``make(label)``, balanced over `labels`, none twice.

    `make` returns a stem and an example whose target is `label`. No two rows of any split
    share a stem, so that a question does not come back with its options in another order.
    """
    used: set[str] = set()
    splits: dict[str, list[Example]] = {}
    for split in SPLITS:
        rows: list[Example] = []
        for label, n_wanted in quotas(draw.shuffled(labels), SIZES[split]).items():
            for _ in range(n_wanted):
                rows.append(_distinct(make, label, used))
        splits[split] = draw.shuffled(rows)
    return splits


def _distinct(make: Callable[[str], tuple[str, Example]], label: str, used: set[str]) -> Example:
    for _ in range(_MAX_TRIES):
        stem, example = make(label)
        if example.target == label and (key := content_key(stem)) not in used:
            used.add(key)
            return example
    raise RuntimeError(f"no new row for {label} in {_MAX_TRIES} tries: the generator is too narrow")

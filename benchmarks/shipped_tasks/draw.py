"""Reproducible random choices, and splits of balanced, distinct rows.

Python guarantees only for `random()` the same sequence in every version, so all choices use it: the committed
data must be reproducible.
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
        """Return an integer from `low` to `high`, both included."""
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
    """Divide `n_rows` among `labels` as evenly as possible; the first labels get the remainder."""
    share, rest = divmod(n_rows, len(labels))
    return {label: share + (index < rest) for index, label in enumerate(labels)}


def fill(make: Callable[[str], tuple[str, Example]], labels: Sequence[str], draw: Draw) -> dict[str, list[Example]]:
    """Fill the three splits with distinct rows from ``make(label)``, balanced over `labels`.

    `make` returns a key and an example with the target `label`. Keys are unique over all splits, so that no
    question occurs twice with its options in another order.
    """
    used: set[str] = set()
    splits: dict[str, list[Example]] = {}
    for split in SPLITS:
        rows: list[Example] = []
        for label, n_label in quotas(draw.shuffled(labels), SIZES[split]).items():
            for _ in range(n_label):
                rows.append(_distinct(make, label, used))
        splits[split] = draw.shuffled(rows)
    return splits


def _distinct(make: Callable[[str], tuple[str, Example]], label: str, used: set[str]) -> Example:
    for _ in range(_MAX_TRIES):
        unique, example = make(label)
        if example.target == label and (key := content_key(unique)) not in used:
            used.add(key)
            return example
    raise RuntimeError(f"no new row for {label} in {_MAX_TRIES} tries: the generator is too narrow")

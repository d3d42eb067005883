"""Splits a labelled table into seed, validation and test, the same way every time.

Where a row goes is decided by a hash of its input and the split's seed, not by a random
generator and not by the order of the file: the split is the same in every Python version
and survives a re-ordered download. Closed answer sets keep their proportions in each split,
so that a small test split is not lopsided by chance.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from arte_edge.errors import InputError
from arte_edge.tasks.task import Answer, Example

__all__ = ["MIN_TABLE", "split_examples", "split_sizes"]

# Below this the validation split falls under the 20 rows that everything later needs.
MIN_TABLE = 50


def split_sizes(n_rows: int) -> dict[str, int]:
    """Return rows a split: 40 seeds and up to 100 for validation; a smaller table is shared 28 : 42 : 30.

    Raises:
        InputError: fewer than `MIN_TABLE` rows.
    """
    if n_rows < MIN_TABLE:
        raise InputError(
            f"{n_rows} usable rows cannot be split: at least {MIN_TABLE} are needed",
            "That is 14 to show the teacher, 20 to choose by and the rest to test on.",
        )
    n_seed = min(40, n_rows * 28 // 100)
    n_validation = min(100, max(20, n_rows * 42 // 100))
    return {"seed": n_seed, "validation": n_validation, "test": n_rows - n_seed - n_validation}


def split_examples(
    examples: Sequence[Example], answer: Answer, split_seed: int, max_rows: int | None = None
) -> dict[str, tuple[Example, ...]]:
    """Split `examples`, which must be distinct, by `split_seed`; `max_rows` takes that many of them first."""

    def rank(example: Example) -> str:
        return hashlib.sha256(f"{split_seed}:{example.key}".encode()).hexdigest()

    # Within a split by another hash than the one that cut it: at the edges of a cut one answer
    # has more of the lowest ranks than the others, and stages take the first n rows of a split.
    def place(example: Example) -> str:
        return hashlib.sha256(f"{split_seed}:place:{example.key}".encode()).hexdigest()

    ordered = sorted(examples, key=rank)
    if answer.closed:
        ordered = _interleave(ordered, split_seed)
    ordered = ordered[:max_rows]
    splits: dict[str, tuple[Example, ...]] = {}
    start = 0
    for split, n_rows in split_sizes(len(ordered)).items():
        splits[split] = tuple(sorted(ordered[start : start + n_rows], key=place))
        start += n_rows
    return splits


def _interleave(ordered: Sequence[Example], split_seed: int) -> list[Example]:
    """Spread each answer evenly over the sequence, so that any stretch has the proportions of the whole."""
    by_target: dict[str, list[Example]] = defaultdict(list)
    for example in ordered:
        by_target[example.target].append(example)
    placed: list[tuple[float, str, Example]] = []
    for target, group in by_target.items():
        digest = hashlib.sha256(f"{split_seed}:{target}".encode()).digest()
        offset = int.from_bytes(digest[:4], "big") / 2**32
        placed += [((index + offset) / len(group), target, example) for index, example in enumerate(group)]
    return [example for _, _, example in sorted(placed, key=lambda item: item[:2])]

"""In which order a training sees its examples, decided once, for all epochs.

The whole order is laid out beforehand and walked from its start. So a resumed
training sees exactly the examples that it still had before it (a length-grouping
sampler would draw anew), and examples of like length share a batch, which on a
CPU saves the time that padding costs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["training_order"]

_WINDOW = 8  # batches that are sorted by length together: like lengths meet, the order stays random


def training_order(lengths: Sequence[int], batch_size: int, epochs: float, seed: int) -> list[int]:
    """Return positions in `lengths` in the order of training, ``round(len(lengths) * epochs)`` of them.

    `lengths` are in tokens. An example is seen at most once more often than another.
    """
    rng = random.Random(seed)
    wanted = max(1, round(len(lengths) * epochs))
    order: list[int] = []
    while len(order) < wanted:
        epoch = list(range(len(lengths)))
        rng.shuffle(epoch)
        order += epoch
    return _grouped(order[:wanted], lengths, batch_size, rng)


def _grouped(order: list[int], lengths: Sequence[int], batch_size: int, rng: random.Random) -> list[int]:
    """Return `order` with batches of like length; a batch that is not full stays last."""
    grouped: list[int] = []
    for start in range(0, len(order), batch_size * _WINDOW):
        window = sorted(order[start : start + batch_size * _WINDOW], key=lambda i: lengths[i])
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        last = [batches.pop()] if len(batches[-1]) < batch_size else []
        rng.shuffle(batches)
        grouped += [i for batch in batches + last for i in batch]
    return grouped

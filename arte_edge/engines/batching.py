"""Which rows share a batch: long shared prefixes together, and no more tokens than fit."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["plan", "shared_prefix"]

_SHORTEST_PREFIX = 8  # tokens; below this sharing costs more than it saves
_NEW_BATCH_TOKENS = 256  # what starting another batch costs, in tokens of prefill


def plan(rows: Sequence[Sequence[int]], new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Return batches of row numbers.

    Rows are taken in the order of their tokens, so that those with a common prefix are
    neighbours. A batch ends when rows times the longest length, with `new_tokens` to
    be written, would exceed `batch_tokens`, or when the next row would cost more of
    the prefix that the batch shares than a batch of its own.
    """
    batches: list[list[int]] = []
    longest = shared = 0
    for index in sorted(range(len(rows)), key=lambda i: list(rows[i])):
        row = rows[index]
        if batches:
            batch = batches[-1]
            kept = min(shared, _common(rows[batch[-1]], row))
            width = max(longest, len(row)) + new_tokens
            fits = (len(batch) + 1) * width <= batch_tokens
            if fits and (len(batch) - 1) * (shared - kept) <= kept + _NEW_BATCH_TOKENS:
                batch.append(index)
                longest, shared = max(longest, len(row)), kept
                continue
        batches.append([index])
        longest = shared = len(row)
    return batches


def shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens are worth sharing: those of all rows, less one to decode in each."""
    if len(rows) < 2:
        return 0
    shared = min(min(map(len, rows)) - 1, *(_common(rows[0], row) for row in rows[1:]))
    return shared if shared >= _SHORTEST_PREFIX else 0


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    n = min(len(left), len(right))
    return next((i for i in range(n) if left[i] != right[i]), n)

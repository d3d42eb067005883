"""What several token lists begin with in common: a tree whose inner parts are decoded once.

All prompts of a preference grid share the task's instructions, those of one draft
share the draft, and each adds a question. A part that lists share is a *stem*; it
hangs on a shorter stem or on nothing. Stems are taken depth first, so that the
sequences that hold them are few: one for each level of the tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["MAX_LEVELS", "Stem", "grow_stems", "n_held"]

MAX_LEVELS = 3  # stems on the way from the root to a list
_SHORTEST = 8  # tokens; below this a copy costs more than decoding again
# A stem is decoded in a batch of its own, and a small batch is a slow one: it must save this many rows.
_LEAST_SAVED = 32


@dataclass(frozen=True)
class Stem:
    """Tokens ``[start, end)`` that lists share, after the stem `parent` (None: from the first token on)."""

    parent: Stem | None
    tokens: tuple[int, ...]  # all of them, from the first token to `end`
    start: int
    level: int  # 0 for a stem without a parent

    @property
    def end(self) -> int:
        return len(self.tokens)

    @property
    def way(self) -> list[Stem]:
        """The stems from the root to this one, which is the last."""
        return [*(self.parent.way if self.parent else ()), self]


def n_held(way: Sequence[Stem], held: Sequence[Stem]) -> int:
    """Return how many stems at the start of `way` are those that are held already."""
    pairs = enumerate(zip(way, held, strict=False))
    return next((i for i, (a, b) in pairs if a is not b), min(len(way), len(held)))


def grow_stems(lists: Sequence[Sequence[int]], most: Sequence[int]) -> list[tuple[int, Stem | None]]:
    """Return ``(index of a list, the stem it hangs on)`` for every list, those of one stem side by side.

    Otherwise the order is that in which the lists came: neighbours in a batch are what they
    were, whatever is in the lists.

    Args:
        lists: token lists.
        most: how many leading tokens of each list may be shared; fewer than it has.
    """
    return list(_grow(lists, most, list(range(len(lists))), None))


def _grow(
    lists: Sequence[Sequence[int]], most: Sequence[int], members: list[int], stem: Stem | None
) -> Iterator[tuple[int, Stem | None]]:
    start = stem.end if stem else 0
    level = stem.level + 1 if stem else 0
    if len(members) < 2 or level >= MAX_LEVELS:
        yield from ((i, stem) for i in members)
        return
    for branch in _branches(lists, most, members, start):
        shared = _shared(lists, most, branch)
        saved = (len(branch) - 1) * (shared - start)
        if shared - start >= _SHORTEST and saved >= _LEAST_SAVED:
            tokens = tuple(lists[branch[0]][:shared])
            yield from _grow(lists, most, branch, Stem(stem, tokens, start, level))
        else:
            yield from ((i, stem) for i in branch)


def _branches(
    lists: Sequence[Sequence[int]], most: Sequence[int], members: list[int], start: int
) -> list[list[int]]:
    """Return the members by their first `_SHORTEST` tokens after `start`: fewer are not worth a stem."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i in members:
        found.setdefault(tuple(lists[i][start : min(start + _SHORTEST, most[i])]), []).append(i)
    return list(found.values())


def _shared(lists: Sequence[Sequence[int]], most: Sequence[int], members: Sequence[int]) -> int:
    """Return how many leading tokens all members share."""
    limit = min(most[i] for i in members)
    first = lists[members[0]]
    for i in members[1:]:
        if list(lists[i][:limit]) != list(first[:limit]):
            limit = next(at for at in range(limit) if lists[i][at] != first[at])
    return limit

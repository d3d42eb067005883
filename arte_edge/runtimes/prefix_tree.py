"""Shared prefixes of token lists, and trees of continuations that are decoded together.

All prompts of a preference grid share the task's instructions, those of one candidate share the candidate, and
each adds a question. Tokens that lists share form a `SharedPrefix`, decoded once; it extends a shorter prefix or
starts at the first token. Prefixes are visited depth first, so few sequences hold them: one per level.

A question and the choices after it form a `Tree`: what several choices begin with is in it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_LEVELS",
    "Context",
    "Group",
    "Stem",
    "Tree",
    "cells_of",
    "grow_stems",
    "longest_ways",
    "n_held",
    "plan_groups",
]

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


Context = tuple[int, ...]  # tokens from the first one on
Note = Callable[[Context, NDArray[np.float32]], None]
_Rows = list[tuple[int, int, int, int, bool]]  # token, position, first leaf, one past the last, wanted


@dataclass
class Tree:
    """Ways on from one beginning: sorted token lists, of which none begins with another.

    `wanted` says who gets the logits ``[v]`` after which contexts, each the beginning of a way.
    """

    ways: list[Context]
    wanted: dict[Context, list[Note]]

    def rows(self, shared: int) -> _Rows:
        """Return the rows after the first `shared` tokens, depth first; leaves are counted from 0."""
        # How much a way has in common with the next one: nothing after the last.
        common = [_common(a, b) for a, b in pairwise(self.ways)] + [0]
        rows: _Rows = []
        for leaf, way in enumerate(self.ways):
            for at in range(max(shared, common[leaf - 1]), len(way)):
                end = leaf + 1
                while common[end - 1] > at:
                    end += 1
                rows.append((way[at], at, leaf, end, way[: at + 1] in self.wanted))
        return rows

    @classmethod
    def joined(cls, trees: Sequence[Tree]) -> Tree:
        """Return one tree of several, what they begin with in common in it once."""
        wanted: dict[Context, list[Note]] = {}
        for tree in trees:
            for context, notes in tree.wanted.items():
                wanted.setdefault(context, []).extend(notes)
        return cls(longest_ways(way for tree in trees for way in tree.ways), wanted)


def _common(left: Context, right: Context) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def longest_ways(contexts: Iterable[Context]) -> list[Context]:
    """Return `contexts` sorted, without those that another one begins with."""
    ways = sorted(set(contexts))  # in this order a context comes right before those that begin with it
    return [way for way, after in zip(ways, [*ways[1:], ()], strict=True) if after[: len(way)] != way]


@dataclass(frozen=True)
class Group:
    """A tree that is decoded at once after the prefix `stem`, and its rows."""

    stem: Stem | None
    tree: Tree
    rows: _Rows

    @property
    def cells(self) -> int:
        """Tokens that the cache must hold for it."""
        return (self.stem.end if self.stem else 0) + len(self.rows)


def plan_groups(trees: Sequence[Tree], most_rows: int, most_leaves: int) -> list[Group]:
    """Return which trees are decoded together: those of one prefix, in about equal groups of at most `most_rows`.

    A tree on its own may exceed `most_rows`; none has more than `most_leaves`.
    """
    # A prefix ends before the tree's own ways part, and leaves a token of each context to decode.
    most = [min(_common(tree.ways[0], tree.ways[-1]), min(map(len, tree.wanted)) - 1) for tree in trees]
    order = grow_stems([tree.ways[0] for tree in trees], most)
    found = [_rooted(stem, trees[i]) for i, stem in order]
    for level in reversed(range(MAX_LEVELS)):
        found = [
            one for family in _families(found) for one in _inlined(family, level, most_rows, most_leaves)
        ]
    return [group for family in _families(found) for group in _split(family, most_rows, most_leaves)]


def _rooted(stem: Stem | None, *trees: Tree) -> Group:
    tree = Tree.joined(trees)
    return Group(stem, tree, tree.rows(stem.end if stem else 0))


def _families(found: Sequence[Group]) -> list[list[Group]]:
    return [list(family) for _, family in groupby(found, key=lambda one: id(one.stem))]


def _inlined(family: list[Group], level: int, most_rows: int, most_leaves: int) -> list[Group]:
    """Make one tree of a family and its prefix where both fit in a batch: a prefix alone is a small batch."""
    stem = family[0].stem
    if stem is None or stem.level != level:
        return family
    rows = stem.end - stem.start + sum(len(one.rows) for one in family)
    if rows > most_rows or sum(len(one.tree.ways) for one in family) > most_leaves:
        return family
    return [_rooted(stem.parent, *(one.tree for one in family))]


def _split(family: list[Group], most_rows: int, most_leaves: int) -> list[Group]:
    """Split a family into groups of about the same number of rows: a small rest is a slow batch."""
    left = sum(len(one.rows) for one in family)
    groups: list[list[Group]] = []
    rows = leaves = share = 0
    for one in family:
        n_row, n_leaf = len(one.rows), len(one.tree.ways)
        full = rows + n_row > most_rows or leaves + n_leaf > most_leaves
        if not groups or full or rows + n_row // 2 > share:
            left -= rows
            share = left // -(-left // most_rows)
            groups.append([])
            rows = leaves = 0
        groups[-1].append(one)
        rows, leaves = rows + n_row, leaves + n_leaf
    return [_rooted(family[0].stem, *(one.tree for one in members)) for members in groups]


def cells_of(groups: Sequence[Group]) -> int:
    """Return how many tokens the cache must hold at most."""
    return max(group.cells for group in groups)

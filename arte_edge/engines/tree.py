"""Continuations to score as trees of tokens, and which of them are decoded together.

A question and the choices after it are a tree: what several choices begin with is in it once. The
questions of a draft share the draft as a prefix (`llama_stems`), which is decoded once and kept.
`llama_tree` and `hf_tree` decode the groups that come out of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from arte_edge.engines.llama_stems import MAX_LEVELS, Stem, grow_stems

__all__ = ["Context", "Group", "Tree", "cells_of", "longest_ways", "plan_groups"]

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

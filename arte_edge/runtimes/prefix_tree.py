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

MAX_LEVELS = 3  # nested prefixes, from the shortest to the longest
_SHORTEST = 8  # tokens; below this a copy costs more than decoding again
# A prefix is decoded in a batch of its own, and small batches are slow: it must save this many rows.
_LEAST_SAVED = 32


@dataclass(frozen=True)
class SharedPrefix:
    """Tokens ``[start, end)`` that lists share, after the shorter prefix `parent` (None: from the first token)."""

    parent: SharedPrefix | None
    tokens: tuple[int, ...]  # all of them, from the first token to `end`
    start: int
    level: int  # 0 for a prefix without a parent

    @property
    def end(self) -> int:
        return len(self.tokens)

    @property
    def path(self) -> list[SharedPrefix]:
        """The prefixes from the shortest to this one, which is the last."""
        return [*(self.parent.path if self.parent else ()), self]


def n_cached(path: Sequence[SharedPrefix], cached: Sequence[SharedPrefix]) -> int:
    """Return how many prefixes at the start of `path` are the ones in the cache."""
    pairs = enumerate(zip(path, cached, strict=False))
    return next((i for i, (a, b) in pairs if a is not b), min(len(path), len(cached)))


def group_by_prefix(lists: Sequence[Sequence[int]], limits: Sequence[int]) -> list[tuple[int, SharedPrefix | None]]:
    """Return ``(index of a list, its prefix)`` for every list, those with the same prefix next to each other.

    Otherwise the order of the lists is kept, so that batches do not depend on their content.

    Args:
        lists: token lists.
        limits: how many leading tokens of each list may be shared; fewer than it has.
    """
    return list(_group(lists, limits, list(range(len(lists))), None))


def _group(
    lists: Sequence[Sequence[int]], limits: Sequence[int], members: list[int], prefix: SharedPrefix | None
) -> Iterator[tuple[int, SharedPrefix | None]]:
    start = prefix.end if prefix else 0
    level = prefix.level + 1 if prefix else 0
    if len(members) < 2 or level >= MAX_LEVELS:
        yield from ((i, prefix) for i in members)
        return
    for branch in _branches(lists, limits, members, start):
        shared = _shared(lists, limits, branch)
        saved = (len(branch) - 1) * (shared - start)
        if shared - start >= _SHORTEST and saved >= _LEAST_SAVED:
            tokens = tuple(lists[branch[0]][:shared])
            yield from _group(lists, limits, branch, SharedPrefix(prefix, tokens, start, level))
        else:
            yield from ((i, prefix) for i in branch)


def _branches(lists: Sequence[Sequence[int]], limits: Sequence[int], members: list[int], start: int) -> list[list[int]]:
    """Return the members grouped by their first `_SHORTEST` tokens after `start`: shorter prefixes do not pay."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i in members:
        found.setdefault(tuple(lists[i][start : min(start + _SHORTEST, limits[i])]), []).append(i)
    return list(found.values())


def _shared(lists: Sequence[Sequence[int]], limits: Sequence[int], members: Sequence[int]) -> int:
    """Return how many leading tokens all members share."""
    limit = min(limits[i] for i in members)
    first = lists[members[0]]
    for i in members[1:]:
        if list(lists[i][:limit]) != list(first[:limit]):
            limit = next(at for at in range(limit) if lists[i][at] != first[at])
    return limit


Context = tuple[int, ...]  # tokens from the first one on
Reader = Callable[[Context, NDArray[np.float32]], None]
_Rows = list[
    tuple[int, int, int, int, bool]
]  # token, position, first leaf, one past the last, whether its logits are read


@dataclass
class Tree:
    """Continuations of one beginning: sorted token lists, none of which is a prefix of another.

    `readers` maps contexts, each a prefix of a path, to the functions that take the logits ``[v]`` after it.
    """

    paths: list[Context]
    readers: dict[Context, list[Reader]]

    def rows(self, shared: int) -> _Rows:
        """Return the rows after the first `shared` tokens, depth first; leaves are counted from 0."""
        # How many tokens a path shares with the next one; 0 after the last.
        common = [n_common(a, b) for a, b in pairwise(self.paths)] + [0]
        rows: _Rows = []
        for leaf, path in enumerate(self.paths):
            for at in range(max(shared, common[leaf - 1]), len(path)):
                end = leaf + 1
                while common[end - 1] > at:
                    end += 1
                rows.append((path[at], at, leaf, end, path[: at + 1] in self.readers))
        return rows

    @classmethod
    def joined(cls, trees: Sequence[Tree]) -> Tree:
        """Return one tree made of several, with what they share in it once."""
        readers: dict[Context, list[Reader]] = {}
        for tree in trees:
            for context, more in tree.readers.items():
                readers.setdefault(context, []).extend(more)
        return cls(longest_paths(path for tree in trees for path in tree.paths), readers)


def n_common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many leading tokens two lists share."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def longest_paths(contexts: Iterable[Context]) -> list[Context]:
    """Return `contexts` sorted, without those that are a prefix of another one."""
    paths = sorted(set(contexts))  # in this order a context comes right before those that extend it
    return [path for path, after in zip(paths, [*paths[1:], ()], strict=True) if after[: len(path)] != path]


@dataclass(frozen=True)
class Group:
    """A tree that is decoded in one batch after `prefix`, and its rows."""

    prefix: SharedPrefix | None
    tree: Tree
    rows: _Rows

    @property
    def cells(self) -> int:
        """Tokens that the KV cache must hold for it."""
        return (self.prefix.end if self.prefix else 0) + len(self.rows)


def plan_groups(trees: Sequence[Tree], max_rows: int, max_leaves: int) -> list[Group]:
    """Return which trees are decoded together: those of one prefix, in about equal groups of at most `max_rows`.

    A tree on its own may exceed `max_rows`; none has more than `max_leaves`.
    """
    # A prefix ends before the tree's own paths diverge, and leaves a token of each context to decode.
    limits = [min(n_common(tree.paths[0], tree.paths[-1]), min(map(len, tree.readers)) - 1) for tree in trees]
    order = group_by_prefix([tree.paths[0] for tree in trees], limits)
    found = [_rooted(prefix, trees[i]) for i, prefix in order]
    for level in reversed(range(MAX_LEVELS)):
        found = [one for family in _families(found) for one in _inlined(family, level, max_rows, max_leaves)]
    return [group for family in _families(found) for group in _split(family, max_rows, max_leaves)]


def _rooted(prefix: SharedPrefix | None, *trees: Tree) -> Group:
    tree = Tree.joined(trees)
    return Group(prefix, tree, tree.rows(prefix.end if prefix else 0))


def _families(found: Sequence[Group]) -> list[list[Group]]:
    return [list(family) for _, family in groupby(found, key=lambda one: id(one.prefix))]


def _inlined(family: list[Group], level: int, max_rows: int, max_leaves: int) -> list[Group]:
    """Merge a family and its prefix into one tree where both fit in a batch: a prefix alone is a small batch."""
    prefix = family[0].prefix
    if prefix is None or prefix.level != level:
        return family
    rows = prefix.end - prefix.start + sum(len(one.rows) for one in family)
    if rows > max_rows or sum(len(one.tree.paths) for one in family) > max_leaves:
        return family
    return [_rooted(prefix.parent, *(one.tree for one in family))]


def _split(family: list[Group], max_rows: int, max_leaves: int) -> list[Group]:
    """Split a family into groups with about the same number of rows: a small remainder is a slow batch."""
    left = sum(len(one.rows) for one in family)
    groups: list[list[Group]] = []
    rows = leaves = share = 0
    for one in family:
        n_row, n_leaf = len(one.rows), len(one.tree.paths)
        full = rows + n_row > max_rows or leaves + n_leaf > max_leaves
        if not groups or full or rows + n_row // 2 > share:
            left -= rows
            share = left // -(-left // max_rows)
            groups.append([])
            rows = leaves = 0
        groups[-1].append(one)
        rows, leaves = rows + n_row, leaves + n_leaf
    return [_rooted(family[0].prefix, *(one.tree for one in members)) for members in groups]


def cells_of(groups: Sequence[Group]) -> int:
    """Return how many tokens the cache must hold at most."""
    return max(group.cells for group in groups)

"""Decode trees of continuations in llama.cpp: a question and all ways on from it in one batch.

llama.cpp lets a token belong to several sequences, so a tree is decoded at once: each leaf is a
sequence, and an inner token belongs to the sequences of all leaves behind it.

The cache is unified, which makes copies free, and a batch's cells are given back after it, so
that attention looks at the prefix and at one batch. Where the cells of a batch stand together,
llama.cpp's flash attention works on tiles of 64 × 64; in the split cache of `llama_batch` each
sequence has fewer than 64 rows and would be attended to row by row, which takes longer than all
the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arte_edge.runtimes.llamacpp.bindings import LlamaContext
from arte_edge.runtimes.llamacpp.context_memory import Layout
from arte_edge.runtimes.prefix_tree import MAX_LEVELS, Group, Stem, n_held

__all__ = ["MOST_LEAVES", "TREE_LAYOUT", "run_trees"]

TREE_LAYOUT = Layout(unified=True, flash=True, ubatch=512)
MOST_LEAVES = 125  # sequences of one batch; with the prefixes' a power of two below llama.cpp's 256


def run_trees(context: LlamaContext, groups: Sequence[Group]) -> None:
    """Decode every group in a cleared unified context, whose first `MAX_LEVELS` sequences hold prefixes."""
    held: list[Stem] = []
    for group in groups:
        held = _hold(context, group.stem, held)
        leaves = range(MAX_LEVELS, MAX_LEVELS + len(group.tree.ways))
        if group.stem is not None:
            for leaf in leaves:
                context.copy(group.stem.level, leaf)
        _decode(context, group)
        for leaf in leaves:
            context.drop(leaf)


def _hold(context: LlamaContext, stem: Stem | None, held: list[Stem]) -> list[Stem]:
    """Decode the stems on the way to `stem` that are not held yet, forget those beside it; return the held ones."""
    way = stem.way if stem else []
    same = n_held(way, held)
    for level in range(same, len(held)):
        context.drop(level)
    for one in way[same:]:
        if one.parent is not None:
            context.copy(one.level - 1, one.level)
        for start in range(one.start, one.end, context.n_batch):
            at = np.arange(start, min(start + context.n_batch, one.end), dtype=np.int32)
            tokens = np.array(one.tokens, dtype=np.int32)[at]
            context.decode_arrays(tokens, at, np.full_like(at, one.level), np.zeros(len(at), dtype=np.int8))
    return way


def _decode(context: LlamaContext, group: Group) -> None:
    """Decode the rows of a group, whose leaves are the sequences after the prefixes'; hand out the logits."""
    ways = group.tree.ways
    for start in range(0, len(group.rows), context.n_batch):
        part = group.rows[start : start + context.n_batch]
        tokens, positions, first, end, wanted = np.array(part, dtype=np.int32).T
        owners = [np.arange(MAX_LEVELS + a, MAX_LEVELS + b, dtype=np.int32) for _, _, a, b, _ in part]
        logits = context.decode_arrays(
            tokens, positions, np.concatenate(owners), wanted.astype(np.int8), end - first
        )
        asked = [ways[leaf][: at + 1] for _, at, leaf, _, is_wanted in part if is_wanted]
        for way, found in zip(asked, logits, strict=True):
            for note in group.tree.wanted[way]:
                note(way, found)

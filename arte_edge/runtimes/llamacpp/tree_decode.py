"""Decode trees of continuations in llama.cpp: a question and all its choices in one batch.

llama.cpp lets a token belong to several sequences, so a tree is decoded at once: each leaf is a
sequence, and an inner token belongs to the sequences of all leaves behind it.

The cache is unified, which makes copies free, and the cells of a batch are freed after it, so
that attention covers the prefix and one batch. Where the cells of a batch are contiguous,
llama.cpp's flash attention works on tiles of 64 × 64; in the split cache of `scheduler` each
sequence has fewer than 64 rows and would be attended to row by row, which takes longer than all
the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arte_edge.runtimes.llamacpp.bindings import LlamaContext
from arte_edge.runtimes.llamacpp.context_memory import Layout
from arte_edge.runtimes.prefix_tree import MAX_LEVELS, Group, SharedPrefix, n_cached

__all__ = ["MOST_LEAVES", "TREE_LAYOUT", "run_trees"]

TREE_LAYOUT = Layout(unified=True, flash=True, ubatch=512)
MOST_LEAVES = 125  # sequences of one batch; with the prefixes' a power of two below llama.cpp's 256


def run_trees(context: LlamaContext, groups: Sequence[Group]) -> None:
    """Decode every group in an empty unified context, whose first `MAX_LEVELS` sequences hold prefixes."""
    cached: list[SharedPrefix] = []
    for group in groups:
        cached = _load_prefix(context, group.prefix, cached)
        leaves = range(MAX_LEVELS, MAX_LEVELS + len(group.tree.paths))
        if group.prefix is not None:
            for leaf in leaves:
                context.copy(group.prefix.level, leaf)
        _decode(context, group)
        for leaf in leaves:
            context.drop(leaf)


def _load_prefix(
    context: LlamaContext, prefix: SharedPrefix | None, cached: list[SharedPrefix]
) -> list[SharedPrefix]:
    """Decode the prefixes up to `prefix` that are not cached, drop the others; return the cached ones."""
    path = prefix.path if prefix else []
    same = n_cached(path, cached)
    for level in range(same, len(cached)):
        context.drop(level)
    for one in path[same:]:
        if one.parent is not None:
            context.copy(one.level - 1, one.level)
        for start in range(one.start, one.end, context.n_batch):
            at = np.arange(start, min(start + context.n_batch, one.end), dtype=np.int32)
            tokens = np.array(one.tokens, dtype=np.int32)[at]
            context.decode_arrays(tokens, at, np.full_like(at, one.level), np.zeros(len(at), dtype=np.int8))
    return path


def _decode(context: LlamaContext, group: Group) -> None:
    """Decode the rows of a group, whose leaves are the sequences after those of the prefixes; pass the logits on."""
    paths = group.tree.paths
    for start in range(0, len(group.rows), context.n_batch):
        part = group.rows[start : start + context.n_batch]
        tokens, positions, first, end, output = np.array(part, dtype=np.int32).T
        owners = [np.arange(MAX_LEVELS + a, MAX_LEVELS + b, dtype=np.int32) for _, _, a, b, _ in part]
        logits = context.decode_arrays(
            tokens, positions, np.concatenate(owners), output.astype(np.int8), end - first
        )
        contexts = [paths[leaf][: at + 1] for _, at, leaf, _, is_output in part if is_output]
        for path, found in zip(contexts, logits, strict=True):
            for note in group.tree.readers[path]:
                note(path, found)

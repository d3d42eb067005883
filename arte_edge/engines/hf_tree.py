"""Score trees of continuations in transformers: a question and all ways on from it in one row.

No cache is repeated for a question or a choice, nothing is padded, and logits are made for the
tokens that are asked for alone (`hf_row`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arte_edge.engines.hf_row import Part, Row, after, extend, hold
from arte_edge.engines.llama_stems import Stem
from arte_edge.engines.tree import Group

if TYPE_CHECKING:
    import torch

__all__ = ["MOST_ROWS", "run_trees"]

MOST_ROWS = 512  # of one group: attention looks at all pairs of them


def run_trees(model: Any, device: torch.device, groups: Sequence[Group]) -> None:
    """Decode every group and hand out its logits."""
    row = Row()
    held: list[Stem] = []
    for group in groups:
        held = hold(model, device, row, group.stem, held)
        tokens, positions, first, end, _ = np.array(group.rows, dtype=np.int64).T
        # A token is on another one's way if it is before it and the other's leaf is behind it.
        seen = (first[None, :] <= first[:, None]) & (first[:, None] < end[None, :])
        seen &= positions[None, :] <= positions[:, None]
        asked = [i for i, (_, _, _, _, wanted) in enumerate(group.rows) if wanted]
        part = Part(row, tokens.tolist(), positions, after(row, seen))
        logits = extend(model, device, [part], asked).cpu().numpy()
        for i, found in zip(asked, logits, strict=True):
            _, at, leaf, _, _ = group.rows[i]
            way = group.tree.ways[leaf][: at + 1]
            for note in group.tree.wanted[way]:
                note(way, found)

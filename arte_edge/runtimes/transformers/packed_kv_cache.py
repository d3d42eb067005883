"""Rows of a transformers cache in which many sequences stand side by side.

A mask says which cells of its row each new token sees, so sequences with a common prefix keep it once, need
no padding, and come and go at any step. Attention to cells nobody asked for, which are masked, is the price;
so the sequences are spread over several rows. The rows' tokens go through the model as one list: every matrix
product is one for all of them, and only attention is done row by row.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.private_names import missing
from arte_edge.runtimes.prefix_tree import Group, Stem, n_held

if TYPE_CHECKING:
    import torch

__all__ = ["MOST_ROWS", "Part", "Row", "after", "extend", "hold", "run_trees", "takes_rows"]

_LAYERS = {"full_attention", "sliding_attention"}
_FIRST_CELLS = 512
_PIECE = 512  # tokens of a prefix in one call: a mask is so many by all cells
_ATTENTION = "arte_edge_rows"  # the name that attention over rows is registered by


def takes_rows(model: Any) -> bool:
    """Return whether `model` attends by a mask and positions alone, and make its attention take rows if so."""
    known = inspect.signature(model.forward).parameters
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or _LAYERS)
    # Scores that are squeezed before the softmax (Gemma 2) are not what `scaled_dot_product_attention` computes.
    plain = getattr(config, "attn_logit_softcapping", None) is None
    if missing(__name__) or not (
        plain and {"position_ids", "logits_to_keep"} <= set(known) and layers <= _LAYERS
    ):
        return False
    if config._attn_implementation == "sdpa":
        _register()
        model.set_attn_implementation(_ATTENTION)
    return bool(config._attn_implementation == _ATTENTION)


class Row:
    """Cells: the keys and values of the tokens of some sequences."""

    def __init__(self) -> None:
        self.n_cells = 0
        self._buffers: dict[int, list[torch.Tensor]] = {}  # by layer: keys and values [1, g, size, head_dim]

    def append(self, layer: int, new: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
        """Put keys and values ``[1, g, n, head_dim]`` behind the first `at` cells; return all of them."""
        end = at + new[0].shape[2]
        held = self._buffers.get(layer)
        if held is None or held[0].shape[2] < end:
            size = max(_FIRST_CELLS, 2 * end)
            grown = [s.new_empty((1, s.shape[1], size, s.shape[3])) for s in new]
            for target, source in zip(grown, held or [], strict=False):
                target[:, :, :at] = source[:, :, :at]
            held = self._buffers[layer] = grown
        for target, source in zip(held, new, strict=True):
            target[:, :, at:end] = source
        return [buffer[:, :, :end] for buffer in held]

    def crop(self, n_cells: int) -> None:
        """Forget all cells but the first `n_cells`."""
        self.n_cells = min(n_cells, self.n_cells)

    def keep(self, cells: NDArray[np.int64]) -> None:
        """Forget all cells but `cells`, which move together in this order."""
        import torch

        with torch.inference_mode():
            for held in self._buffers.values():
                index = torch.from_numpy(cells).to(held[0].device)
                for buffer in held:
                    buffer[:, :, : len(cells)] = buffer.index_select(2, index)
        self.n_cells = len(cells)

    def adopt(self, other: Row, cells: NDArray[np.int64]) -> None:
        """Append copies of the `cells` of another row."""
        import torch

        with torch.inference_mode():
            for layer, held in other._buffers.items():
                index = torch.from_numpy(cells).to(held[0].device)
                self.append(layer, [buffer.index_select(2, index) for buffer in held], self.n_cells)
        self.n_cells += len(cells)


@dataclass(frozen=True)
class Part:
    """New tokens of one row."""

    row: Row
    tokens: Sequence[int]  # [n]
    positions: NDArray[np.int64]  # [n]
    seen: NDArray[np.bool_]  # [n, n_cells + n]: which cells each token looks at, the new ones included


def extend(model: Any, device: torch.device, parts: Sequence[Part], wanted: Sequence[int]) -> torch.Tensor:
    """Append each part's tokens to its row; return the logits ``[w, v]`` of the `wanted` ones of all tokens."""
    import torch

    cache = _cells(parts, model, device)
    tokens = [token for part in parts for token in part.tokens]
    positions = np.concatenate([part.positions for part in parts])
    with torch.inference_mode():
        out = model(
            input_ids=torch.tensor([tokens], device=device),
            # A mask of four dimensions is handed on as it is; attention over rows has its own.
            attention_mask=torch.zeros((1, 1, 1, 1), dtype=model.dtype, device=device),
            position_ids=torch.from_numpy(positions)[None].to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(list(wanted), device=device),
        )
    for part in parts:
        part.row.n_cells += len(part.tokens)
    logits: torch.Tensor = out.logits[0].float()
    return logits


def hold(model: Any, device: torch.device, row: Row, stem: Stem | None, held: Sequence[Stem]) -> list[Stem]:
    """Leave exactly the prefix `stem` in the row, computing what is not there; return the stems on the way."""
    way = stem.way if stem else []
    same = n_held(way, held)
    row.crop(way[same - 1].end if same else 0)
    for one in way[same:]:
        for start in range(one.start, one.end, _PIECE):
            at = np.arange(start, min(start + _PIECE, one.end))
            tokens = one.tokens[start : start + len(at)]
            seen = np.tri(len(at), dtype=np.bool_)
            extend(model, device, [Part(row, tokens, at, after(row, seen))], [len(at) - 1])
    return way


def after(row: Row, seen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask of new tokens that see all cells there are, and each other as `seen` says."""
    return np.concatenate([np.ones((len(seen), row.n_cells), dtype=np.bool_), seen], axis=1)


@dataclass(frozen=True)
class _Seen:
    """What attention gets in place of keys: for each row its tokens' place, keys, values and mask."""

    rows: list[tuple[slice, list[torch.Tensor], torch.Tensor]]


def _cells(parts: Sequence[Part], model: Any, device: torch.device) -> Any:
    """Return a cache that appends in place, to each row its own: the library's own copies all of itself."""
    import torch
    from transformers import DynamicCache

    config = model.config.get_text_config()
    times = config.num_attention_heads // config.num_key_value_heads
    places, masks, start = [], [], 0
    for part in parts:
        places.append(slice(start, start + len(part.tokens)))
        start += len(part.tokens)
        mask = torch.zeros(part.seen.shape, dtype=model.dtype)
        mask.masked_fill_(torch.from_numpy(~part.seen), torch.finfo(model.dtype).min)
        masks.append(mask.repeat(times, 1).to(device))  # the heads that share keys are more queries

    class Cells(DynamicCache):  # type: ignore[misc]  # transformers has no types
        def update(self, keys: Any, values: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
            rows = []
            for part, place, mask in zip(parts, places, masks, strict=True):
                new = [keys[:, :, place], values[:, :, place]]
                rows.append((place, part.row.append(layer_idx, new, part.row.n_cells), mask))
            return _Seen(rows), None

    return Cells()


def _register() -> None:
    """Tell transformers of attention over rows; what else comes this way is attended to as before."""
    import torch
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **settings: Any
    ) -> tuple[Any, None]:
        if not isinstance(key, _Seen):
            found: tuple[Any, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, **settings
            )
            return found
        _, heads, n, width = query.shape
        out = query.new_empty((1, n, heads, width))
        for place, (keys, values), mask in key.rows:
            groups = keys.shape[1]
            mine = query[:, :, place].reshape(1, groups, -1, width)
            attended = torch.nn.functional.scaled_dot_product_attention(
                mine, keys, values, attn_mask=mask, scale=settings.get("scaling")
            )
            out[:, place] = attended.view(1, heads, -1, width).transpose(1, 2)
        return out, None

    AttentionInterface.register(_ATTENTION, attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


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

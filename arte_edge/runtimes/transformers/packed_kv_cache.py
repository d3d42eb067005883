"""A packed KV cache for transformers: several sequences share one row, separated by attention masks.

A mask says which cells of its row each new token attends to, so sequences with a common prefix store it once, need
no padding, and enter and leave at any step. The price is attention over masked cells, so the sequences are spread
over several rows. The tokens of all rows go through the model as one list: matrix products are computed for all of
them together, and only attention is computed row by row.

`run_trees` scores trees of continuations this way: a question and all its choices are one row, no cache is
repeated for a choice, nothing is padded, and logits are computed only for the tokens that need them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.private_apis import missing
from arte_edge.runtimes.prefix_tree import Group, SharedPrefix, n_cached

if TYPE_CHECKING:
    import torch

_LAYERS = {"full_attention", "sliding_attention"}
_FIRST_CELLS = 512
_PIECE = 512  # tokens of a prefix in one call: its mask has so many rows and a column a cell
_ATTENTION = "arte_edge_rows"  # the name under which attention over rows is registered


def supports_packing(model: Any) -> bool:
    """Return whether `model` attends by mask and positions alone; if so, switch it to attention over rows."""
    known = inspect.signature(model.forward).parameters
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or _LAYERS)
    # `scaled_dot_product_attention` does not compute soft-capped scores (Gemma 2).
    plain = getattr(config, "attn_logit_softcapping", None) is None
    if missing(__name__) or not (plain and {"position_ids", "logits_to_keep"} <= set(known) and layers <= _LAYERS):
        return False
    if config._attn_implementation == "sdpa":
        _register()
        model.set_attn_implementation(_ATTENTION)
    return bool(config._attn_implementation == _ATTENTION)


class CacheRow:
    """One row of cells: the keys and values of the tokens of some sequences."""

    def __init__(self) -> None:
        self.n_cells = 0
        self._buffers: dict[int, list[torch.Tensor]] = {}  # by layer: keys and values [1, g, size, head_dim]

    def append(self, layer: int, new: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
        """Store keys and values ``[1, g, n, head_dim]`` after the first `at` cells; return all of them."""
        end = at + new[0].shape[2]
        cached = self._buffers.get(layer)
        if cached is None or cached[0].shape[2] < end:
            size = max(_FIRST_CELLS, 2 * end)
            grown = [s.new_empty((1, s.shape[1], size, s.shape[3])) for s in new]
            for target, source in zip(grown, cached or [], strict=False):
                target[:, :, :at] = source[:, :, :at]
            cached = self._buffers[layer] = grown
        for target, source in zip(cached, new, strict=True):
            target[:, :, at:end] = source
        return [buffer[:, :, :end] for buffer in cached]

    def crop(self, n_cells: int) -> None:
        """Drop all cells except the first `n_cells`."""
        self.n_cells = min(n_cells, self.n_cells)

    def keep(self, cells: NDArray[np.int64]) -> None:
        """Drop all cells except `cells`, which become contiguous in this order."""
        import torch

        with torch.inference_mode():
            for cached in self._buffers.values():
                index = torch.from_numpy(cells).to(cached[0].device)
                for buffer in cached:
                    buffer[:, :, : len(cells)] = buffer.index_select(2, index)
        self.n_cells = len(cells)

    def adopt(self, other: CacheRow, cells: NDArray[np.int64]) -> None:
        """Append copies of the `cells` of another row."""
        import torch

        with torch.inference_mode():
            for layer, cached in other._buffers.items():
                index = torch.from_numpy(cells).to(cached[0].device)
                self.append(layer, [buffer.index_select(2, index) for buffer in cached], self.n_cells)
        self.n_cells += len(cells)


@dataclass(frozen=True)
class NewTokens:
    """New tokens of one row."""

    row: CacheRow
    tokens: Sequence[int]  # [n]
    positions: NDArray[np.int64]  # [n]
    seen: NDArray[np.bool_]  # [n, n_cells + n]: which cells each token attends to, the new ones included


def forward_rows(model: Any, device: torch.device, parts: Sequence[NewTokens], outputs: Sequence[int]) -> torch.Tensor:
    """Append each part's tokens to its row; return logits ``[o, v]`` of the tokens at the indices `outputs`."""
    import torch

    cache = _cells(parts, model, device)
    tokens = [token for part in parts for token in part.tokens]
    positions = np.concatenate([part.positions for part in parts])
    with torch.inference_mode():
        out = model(
            input_ids=torch.tensor([tokens], device=device),
            # A four-dimensional mask is passed on unchanged; attention over rows has its own.
            attention_mask=torch.zeros((1, 1, 1, 1), dtype=model.dtype, device=device),
            position_ids=torch.from_numpy(positions)[None].to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(list(outputs), device=device),
        )
    for part in parts:
        part.row.n_cells += len(part.tokens)
    logits: torch.Tensor = out.logits[0].float()
    return logits


def load_prefix(
    model: Any, device: torch.device, row: CacheRow, prefix: SharedPrefix | None, cached: Sequence[SharedPrefix]
) -> list[SharedPrefix]:
    """Make `prefix` the whole content of the row, computing what is missing; return the cached prefixes."""
    path = prefix.path if prefix else []
    same = n_cached(path, cached)
    row.crop(path[same - 1].end if same else 0)
    for one in path[same:]:
        for start in range(one.start, one.end, _PIECE):
            at = np.arange(start, min(start + _PIECE, one.end))
            tokens = one.tokens[start : start + len(at)]
            seen = np.tri(len(at), dtype=np.bool_)
            forward_rows(model, device, [NewTokens(row, tokens, at, with_cached(row, seen))], [len(at) - 1])
    return path


def with_cached(row: CacheRow, seen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the mask of new tokens that attend to all cached cells, and to each other as in `seen`."""
    return np.concatenate([np.ones((len(seen), row.n_cells), dtype=np.bool_), seen], axis=1)


@dataclass(frozen=True)
class _Seen:
    """Passed to attention in place of keys: for each row the slice of its tokens, keys, values and mask."""

    rows: list[tuple[slice, list[torch.Tensor], torch.Tensor]]


def _cells(parts: Sequence[NewTokens], model: Any, device: torch.device) -> Any:
    """Return a cache that appends to each row in place; the library's own cache copies itself."""
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
    """Register attention over rows with transformers; ordinary keys are attended to as before."""
    import torch
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **settings: Any) -> tuple[Any, None]:
        if not isinstance(key, _Seen):
            found: tuple[Any, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
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


MOST_ROWS = 512  # rows of one group: attention covers all pairs of them


def run_trees(model: Any, device: torch.device, groups: Sequence[Group]) -> None:
    """Decode every group and pass its logits to their readers."""
    row = CacheRow()
    cached: list[SharedPrefix] = []
    for group in groups:
        cached = load_prefix(model, device, row, group.prefix, cached)
        tokens, positions, first, end, _ = np.array(group.rows, dtype=np.int64).T
        # A token is an ancestor of another one if it comes before it and the other's leaf is below it.
        seen = (first[None, :] <= first[:, None]) & (first[:, None] < end[None, :])
        seen &= positions[None, :] <= positions[:, None]
        outputs = [i for i, (_, _, _, _, read) in enumerate(group.rows) if read]
        part = NewTokens(row, tokens.tolist(), positions, with_cached(row, seen))
        logits = forward_rows(model, device, [part], outputs).cpu().numpy()
        for i, found in zip(outputs, logits, strict=True):
            _, at, leaf, _, _ = group.rows[i]
            path = group.tree.paths[leaf][: at + 1]
            for reader in group.tree.readers[path]:
                reader(path, found)

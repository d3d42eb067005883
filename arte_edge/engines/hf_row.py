"""One row of a transformers cache in which many sequences stand side by side.

A mask says which cells each new token sees, so sequences with a common prefix keep it once, need
no padding, and come and go at any step. That trades attention to cells nobody asked for, which are
masked, against copies of the prefix for each sequence: on a CPU, where memory is slow and matrix
products are fast, a good trade for some dozens of sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

__all__ = ["Row", "takes_rows"]

_LAYERS = {"full_attention", "sliding_attention"}
_FIRST_CELLS = 1024


def takes_rows(model: Any) -> bool:
    """Return whether `model` attends by a mask and positions alone, so that it can be told who sees whom."""
    known = inspect.signature(model.forward).parameters
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or _LAYERS)
    masked = getattr(config, "_attn_implementation", "") in ("sdpa", "eager")
    return {"position_ids", "logits_to_keep"} <= set(known) and layers <= _LAYERS and masked


class Row:
    """The cells of one row, and the forward call that appends to them."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._cache = _cells()
        self.n_cells = 0

    def extend(
        self,
        tokens: Sequence[int],
        positions: NDArray[np.int64],
        seen: NDArray[np.bool_],
        wanted: Sequence[int],
    ) -> torch.Tensor:
        """Append tokens ``[n]``; return the logits ``[w, v]`` of the `wanted` ones.

        `seen` ``[n, n_cells + n]`` says which cells each token looks at, the new ones included.
        """
        import torch

        mask = torch.zeros((1, 1, *seen.shape), dtype=self._model.dtype)
        mask[0, 0].masked_fill_(torch.from_numpy(~seen), torch.finfo(self._model.dtype).min)
        self._cache.used = self.n_cells
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([list(tokens)], device=self._device),
                attention_mask=mask.to(self._device),
                position_ids=torch.from_numpy(positions)[None].to(self._device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=torch.tensor(list(wanted), device=self._device),
            )
        self.n_cells += len(tokens)
        logits: torch.Tensor = out.logits[0].float()
        return logits

    def crop(self, n_cells: int) -> None:
        """Forget all cells but the first `n_cells`."""
        self.n_cells = min(n_cells, self.n_cells)

    def keep(self, cells: NDArray[np.int64]) -> None:
        """Forget all cells but `cells`, which move together in this order."""
        self._cache.keep(cells)
        self.n_cells = len(cells)


def _cells() -> Any:
    """Return a cache that appends in place: the library's own copies all of itself at each step."""
    import torch
    from transformers import DynamicCache

    class Cells(DynamicCache):  # type: ignore[misc]  # transformers has no types
        def __init__(self) -> None:
            super().__init__()
            self.used = 0
            self.buffers: dict[int, list[torch.Tensor]] = {}

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.used

        def update(
            self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any
        ) -> tuple[Any, Any]:
            end = self.used + key_states.shape[2]
            new = [key_states, value_states]
            held = self.buffers.get(layer_idx)
            if held is None or held[0].shape[2] < end:
                size = max(_FIRST_CELLS, 2 * end)
                grown = [s.new_empty((s.shape[0], s.shape[1], size, s.shape[3])) for s in new]
                for target, source in zip(grown, held or [], strict=False):
                    target[:, :, : self.used] = source[:, :, : self.used]
                held = self.buffers[layer_idx] = grown
            for target, source in zip(held, new, strict=True):
                target[:, :, self.used : end] = source
            return held[0][:, :, :end], held[1][:, :, :end]

        def keep(self, cells: NDArray[np.int64]) -> None:
            with torch.inference_mode():
                for held in self.buffers.values():
                    index = torch.from_numpy(cells).to(held[0].device)
                    for buffer in held:
                        buffer[:, :, : len(cells)] = buffer.index_select(2, index)

    return Cells()

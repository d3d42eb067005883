"""The model calls of the transformers engine: prefill with a shared prefix, one step, a teacher-forced tail.

Rows of a batch are aligned at their ends, with padding between the shared prefix and
a row's own tokens (left padding, if there is no prefix). The mask hides the padding
and positions count real tokens only, so a row's values are those that it has alone,
up to the rounding of another batch shape.

Notation: b rows, s cached positions, n new positions, v vocabulary size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Forward", "State"]


class State:
    """The cache of a batch, which of its positions hold tokens, and where each row stands."""

    def __init__(self, cache: Any, mask: torch.Tensor) -> None:
        self.cache = cache
        self.mask = mask  # [b, s], 1 for a token, 0 for padding

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        index = self.mask.new_tensor(rows)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]

    def repeat(self, times: int) -> None:
        """Repeat each row, its copies side by side."""
        self.cache.batch_repeat_interleave(times)
        self.mask = self.mask.repeat_interleave(times, dim=0)


class Forward:
    """Runs a causal language model over batches of token lists."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        # Without it a prefill would make logits for every position of every row.
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        self._held: tuple[tuple[int, ...], Any] = ((), None)

    def prefill(self, rows: Sequence[Sequence[int]], shared: int) -> tuple[torch.Tensor, State]:
        """Decode `rows`, whose first `shared` tokens are the same; return the next logits ``[b, v]``."""
        import torch

        cache = None
        if shared:
            cache = self._prefix(tuple(rows[0][:shared]))
            cache.batch_repeat_interleave(len(rows))
        width = max(len(row) for row in rows) - shared
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros((len(rows), shared + width), dtype=torch.long)
        mask[:, :shared] = 1
        for i, row in enumerate(rows):
            n = len(row) - shared
            ids[i, width - n :] = torch.tensor(row[shared:], dtype=torch.long)
            mask[i, shared + width - n :] = 1
        state = State(cache, mask.to(self._device))
        return self._call(ids, state, **self._last_only)[:, -1].float(), state

    def step(self, state: State, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each row; return the next logits ``[b, v]``."""
        return self.extend(state, [[token] for token in tokens])[:, -1]

    def extend(self, state: State, tails: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append a tail to each row, short ones padded at the end; return all their logits ``[b, n, v]``."""
        import torch

        width = max(len(tail) for tail in tails)
        ids = torch.tensor([[*tail, *[0] * (width - len(tail))] for tail in tails], dtype=torch.long)
        # What follows a row's last token is never looked at, so the mask need not hide it.
        state.mask = torch.cat([state.mask, state.mask.new_ones(ids.shape)], dim=1)
        return self._call(ids, state).float()

    def _prefix(self, tokens: tuple[int, ...]) -> Any:
        """Return a cache ``[1, s]`` of the prefix, the caller's to change; computed once for equal tokens."""
        import torch

        if self._held[0] != tokens:
            state = State(None, torch.ones((1, len(tokens)), dtype=torch.long, device=self._device))
            self._call(torch.tensor([tokens]), state, **self._last_only)
            self._held = (tokens, state.cache)
        return copy.deepcopy(self._held[1])

    def _call(self, ids: torch.Tensor, state: State, **options: int) -> torch.Tensor:
        import torch

        positions = (state.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.inference_mode():
            out = self._model(
                input_ids=ids.to(self._device),
                attention_mask=state.mask,
                position_ids=positions,
                past_key_values=state.cache,
                use_cache=True,
                **options,
            )
        state.cache = out.past_key_values
        logits: torch.Tensor = out.logits
        return logits

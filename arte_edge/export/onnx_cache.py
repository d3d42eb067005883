"""The key-value cache of an ONNX decoder, held in buffers of ours that every step uses again.

Two kinds of graph are in use, and each has its way of not copying more than it must:

- *Shared*: the fused attention of onnxruntime-genai's builder writes the new keys behind the old
  ones. Past and present are one buffer, bound once, as long as it has room.
- *Paired*: optimum's graph concatenates, so present is another tensor than past. Two flat buffers
  take turns: what was written at one step is read at the next.

Notation: n_kv key-value heads, d size of a head, s tokens in the cache, c tokens it has room for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cache", "CacheTensor", "PairedCache", "SharedCache"]


@dataclass(frozen=True)
class CacheTensor:
    """One cached tensor of a graph: shape [1, n_kv, s, d], its names on both sides."""

    past: str
    present: str
    n_kv: int
    head_size: int
    dtype: np.dtype[Any]


class Cache(Protocol):
    """Where a session keeps what it has read."""

    def reserve(self, n_past: int, n_total: int) -> None:
        """Make room for `n_total` tokens; the first `n_past` are kept."""

    def bind(self, binding: Any, n_past: int, n_total: int) -> None:
        """Bind the tensors for a step that comes after `n_past` tokens and ends at `n_total`."""

    def stepped(self) -> None:
        """Take what the last step wrote as the past of the next."""


def _room(n_total: int, limit: int) -> int:
    """Return a capacity that seldom has to grow: a power of two, at least 256, at most `limit`."""
    wanted = max(256, 1 << max(n_total - 1, 0).bit_length())
    return max(n_total, min(wanted, limit) if limit else wanted)


class SharedCache:
    """Buffers [1, n_kv, c, d] that are past and present at once."""

    def __init__(self, tensors: list[CacheTensor], limit: int) -> None:
        self._tensors, self._limit = tensors, limit
        self._buffers: list[NDArray[Any]] = []
        self._capacity = 0
        self._is_bound = False

    def reserve(self, n_past: int, n_total: int) -> None:
        """Grow the buffers if they cannot hold `n_total` tokens."""
        if n_total <= self._capacity:
            return
        self._capacity = _room(n_total, self._limit)
        old, self._buffers = self._buffers, []
        for i, tensor in enumerate(self._tensors):
            new = np.zeros((1, tensor.n_kv, self._capacity, tensor.head_size), tensor.dtype)
            if n_past:
                new[:, :, :n_past] = old[i][:, :, :n_past]
            self._buffers.append(new)
        self._is_bound = False

    def bind(self, binding: Any, n_past: int, n_total: int) -> None:
        """Bind each buffer on both sides, once as long as it does not grow."""
        if self._is_bound:
            return
        for tensor, buffer in zip(self._tensors, self._buffers, strict=True):
            place = ("cpu", 0, tensor.dtype.type, buffer.shape, buffer.ctypes.data)
            binding.bind_input(tensor.past, *place)
            binding.bind_output(tensor.present, *place)
        self._is_bound = True

    def stepped(self) -> None:
        """Nothing to do: the new keys stand behind the old ones."""


class PairedCache:
    """Two flat buffers for each tensor; [1, n_kv, s, d] fills the front of one, the next step that of the other."""

    def __init__(self, tensors: list[CacheTensor], limit: int) -> None:
        self._tensors, self._limit = tensors, limit
        self._past: list[NDArray[Any]] = []
        self._present: list[NDArray[Any]] = []
        self._capacity = 0

    def reserve(self, n_past: int, n_total: int) -> None:
        """Grow the buffers if they cannot hold `n_total` tokens."""
        if n_total <= self._capacity:
            return
        self._capacity = _room(n_total, self._limit)
        old = self._past
        sizes = [tensor.n_kv * tensor.head_size for tensor in self._tensors]
        self._past, self._present = (
            [
                np.empty(size * self._capacity, tensor.dtype)
                for size, tensor in zip(sizes, self._tensors, strict=True)
            ]
            for _ in range(2)
        )
        if n_past:
            for new, kept, size in zip(self._past, old, sizes, strict=True):
                new[: size * n_past] = kept[: size * n_past]

    def bind(self, binding: Any, n_past: int, n_total: int) -> None:
        """Bind the filled front of one buffer as past, and of the other as present."""
        for tensor, past, present in zip(self._tensors, self._past, self._present, strict=True):
            before, after = ((1, tensor.n_kv, n, tensor.head_size) for n in (n_past, n_total))
            kind = tensor.dtype.type
            binding.bind_input(tensor.past, "cpu", 0, kind, before, past.ctypes.data)
            binding.bind_output(tensor.present, "cpu", 0, kind, after, present.ctypes.data)

    def stepped(self) -> None:
        """Let the buffers change places."""
        self._past, self._present = self._present, self._past

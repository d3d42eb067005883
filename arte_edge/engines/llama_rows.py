"""The rows of one `llama_decode` call, filled as numpy arrays instead of field by field.

llama.cpp's batch is six C arrays. Numpy looks at them in place, so that filling a
batch is four copies whatever its length.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RowBatch"]


class RowBatch:
    """Room for `capacity` rows, each of one sequence or of several."""

    def __init__(self, lib: Any, capacity: int) -> None:
        self.capacity = capacity
        self.handle = lib.llama_batch_init(capacity, 0, 1)
        self._lib = lib
        self._token = _view(self.handle.token, capacity, ctypes.c_int32)
        self._position = _view(self.handle.pos, capacity, ctypes.c_int32)
        self._wanted = _view(self.handle.logits, capacity, ctypes.c_int8)
        self._count = _view(self.handle.n_seq_id, capacity, ctypes.c_int32)
        # Each row's list of sequences has a memory of its own; ours are parts of the caller's array.
        self._lists = _view(self.handle.seq_id, capacity, ctypes.c_size_t)
        self._theirs = self._lists.copy()
        self._sequences: NDArray[np.int32] | None = None  # kept alive while llama.cpp reads it

    def fill(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        wanted: NDArray[np.int8],
        counts: NDArray[np.int32] | None = None,
    ) -> Any:
        """Set the rows (all ``[n_row]``) and return the C batch, which the next `fill` overwrites.

        With `counts` ``[n_row]`` a row belongs to so many sequences, one after the other in
        `sequences` ``[counts.sum()]``; without, to one.
        """
        n = len(tokens)
        if n > self.capacity:
            raise ValueError(f"{n} rows exceed the batch's {self.capacity}")
        self._token[:n], self._position[:n] = tokens, positions
        self._wanted[:n], self._count[:n] = wanted, 1 if counts is None else counts
        self._sequences = held = np.ascontiguousarray(sequences, dtype=np.int32)
        first = np.arange(n) if counts is None else np.cumsum(counts) - counts
        self._lists[:n] = held.ctypes.data + held.itemsize * first
        self.handle.n_tokens = n
        return self.handle

    def close(self) -> None:
        """Give the memory back; the object cannot be used afterwards."""
        self._lists[:] = self._theirs  # llama.cpp frees what it made
        self._lib.llama_batch_free(self.handle)


def _view(pointer: Any, n: int, kind: Any) -> NDArray[Any]:
    """Return the C array at `pointer` as ``[n]``, in place."""
    address = ctypes.cast(pointer, ctypes.POINTER(kind))
    return np.ctypeslib.as_array(address, shape=(n,))

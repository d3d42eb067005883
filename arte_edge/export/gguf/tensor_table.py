"""The tensors of any GGUF file, a model's or an importance matrix's: names, shapes, types and places.

`models.gguf_header` reads models and sums their tensors up; here each tensor is told
apart, because a quantized file is judged by what it holds and not by its name.
Every length is checked against the size of the file before it is used.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import InputError
from arte_edge.models.gguf_cursor import ARRAY, SCALARS, STRING, CutShort, GgufCursor
from arte_edge.models.gguf_types import TENSOR_TYPES

__all__ = ["TensorInfo", "TensorTable", "read_table"]

_KEPT_ITEMS = 256  # longer arrays are vocabularies: only their length is kept


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in row-major order (``[n_out, n_in]``), `type` by name ("Q4_K"), its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset_bytes: int
    size_bytes: int

    @property
    def n_value(self) -> int:
        return math.prod(self.shape)

    @property
    def row_values(self) -> int:
        """Values in a row: what a type's blocks must divide."""
        return self.shape[-1]


@dataclass(frozen=True)
class TensorTable:
    """All tensors of a file by name, in the file's order, and its metadata (of a long array the length)."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, Any] = field(repr=False)

    def floats(self, name: str) -> NDArray[np.float32]:
        """Return the values of an F32 tensor, in its shape.

        Raises:
            InputError: there is no such tensor, or it is of another type.
        """
        found = self.tensors.get(name)
        if found is None or found.type != "F32":
            held = "missing" if found is None else found.type
            raise InputError(f"{self.path}: tensor {name} is {held}, expected F32")
        values = np.fromfile(self.path, np.dtype("<f4"), found.n_value, offset=found.offset_bytes)
        return values.reshape(found.shape)


def read_table(path: Path) -> TensorTable:
    """Read metadata and tensor records of the GGUF file at `path`; no tensor data is read.

    Raises:
        InputError: not a GGUF (version 2 or 3), cut short, or with a tensor type we do not know.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(data))
    except ValueError as error:  # an empty file cannot be mapped; the others are ours
        raise InputError(f"{path}: not a usable GGUF: {error}", "Make the file again.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Cursor(GgufCursor):
    """Keeps every value but the items of long arrays."""

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.scalar(_code(kind))
        item_kind, count = self.scalar("I"), self.scalar("Q")
        if item_kind != STRING:
            raw = self.take(struct.calcsize("<" + _code(item_kind)) * count)
            items = struct.unpack(f"<{count}{_code(item_kind)}", raw) if count <= _KEPT_ITEMS else ()
        elif count <= _KEPT_ITEMS:
            items = tuple(self.text() for _ in range(count))
        else:
            items = ()
            for _ in range(count):
                self.take(self.scalar("Q"))
        return list(items) if count <= _KEPT_ITEMS else count


def _code(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"it has the unknown value type {kind}")
    return SCALARS[kind]


def _parse(path: Path, cursor: _Cursor) -> TensorTable:
    if (magic := cursor.take(4)) != b"GGUF":
        raise ValueError(f"it begins with {magic!r}, not b'GGUF'")
    if (version := cursor.scalar("I")) not in (2, 3):
        raise ValueError(f"version {version}, we read 2 and 3")
    n_tensor, n_pair = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_pair):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.scalar("I"))
    records = [_record(cursor) for _ in range(n_tensor)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"general.alignment is {alignment}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {
        info.name: TensorInfo(info.name, info.shape, info.type, start + info.offset_bytes, info.size_bytes)
        for info in records
    }
    if any(info.offset_bytes + info.size_bytes > len(cursor.data) for info in tensors.values()):
        raise CutShort
    return TensorTable(path, tensors, metadata)


def _record(cursor: _Cursor) -> TensorInfo:
    name = cursor.text()
    n_dim = cursor.scalar("I")
    if not 1 <= n_dim <= 4:
        raise ValueError(f"tensor {name} has {n_dim} dimensions")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(n_dim)]))
    kind, offset_bytes = cursor.scalar("I"), cursor.scalar("Q")
    if kind not in TENSOR_TYPES:
        raise ValueError(f"tensor {name} has the unknown type {kind}")
    label, block_values, block_bytes = TENSOR_TYPES[kind]
    return TensorInfo(name, shape, label, offset_bytes, math.prod(shape) // block_values * block_bytes)

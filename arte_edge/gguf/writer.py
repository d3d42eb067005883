"""Write a GGUF file block by block, whole or not at all.

A few megabytes of one tensor are in memory at a time, and the file appears under its name only when its last
byte is on disk, so that a killed run never leaves half a model behind.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.cache import whole_file
from arte_edge.checkpoint import Values
from arte_edge.errors import ArteError
from arte_edge.gguf.reader import Field

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["Tensor", "encode", "widened", "write_gguf"]

_HALF_MAX_BITS = 0x7C00  # infinity; above it are the NaNs
_WINDOW = 1 << 20  # values gathered at a time: numpy makes 8 bytes of each index


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: its values are loaded when it is written, at once or in blocks of rows.

    Blocks are float32, float16, or uint16 that holds the bits of bfloat16.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # F32 | F16 | BF16
    load: Callable[[], Values | Iterator[Values]]

    @property
    def size_bytes(self) -> int:
        """Size in the file, without padding."""
        return math.prod(self.shape) * (4 if self.dtype == "F32" else 2)


def write_gguf(out: Path, arch: str, fields: Mapping[str, Field], tensors: Sequence[Tensor]) -> Path:
    """Write `fields` (without ``general.architecture``) and `tensors` to `out`; return `out`.

    Raises:
        ArteError: the disk is full or not writable, or a value does not fit its type.
    """
    with whole_file(out) as partial:
        _write(partial, arch, fields, tensors)
    return out


def _write(path: Path, arch: str, fields: Mapping[str, Field], tensors: Sequence[Tensor]) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, arch)
    for key, field in fields.items():
        _add_field(writer, key, field)
    for tensor in tensors:
        kind, float32 = GGMLQuantizationType[tensor.dtype], np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, float32, tensor.size_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        for tensor in tensors:
            writer.write_padding(file, file.tell())
            _write_values(file, tensor)
        writer.write_padding(file, file.tell())
        writer.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()


def _add_field(writer: GGUFWriter, key: str, field: Field) -> None:
    from gguf import GGUFValueType

    item_kind = None if field.item_kind is None else GGUFValueType(field.item_kind)
    writer.add_key_value(key, field.value, GGUFValueType(field.kind), item_kind)


def _write_values(file: Any, tensor: Tensor) -> None:
    loaded, written_bytes = tensor.load(), 0
    for block in (loaded,) if isinstance(loaded, np.ndarray) else loaded:
        encoded = encode(block, tensor.dtype, tensor.name)
        written_bytes += file.write(encoded.reshape(-1).view(np.uint8).data)
    if written_bytes != tensor.size_bytes:  # the offsets of all that follow would be wrong
        raise ArteError(f"{tensor.name}: {written_bytes} bytes instead of {tensor.size_bytes}")


def widened(values: Values) -> NDArray[np.float32]:
    """Return a block's values as float32, which holds each of them exactly."""
    if values.dtype == np.uint16:
        bits = values.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return np.ascontiguousarray(values, dtype=np.float32)


def encode(values: Values, dtype: str, name: str) -> NDArray[Any]:
    """Return a block as the numbers of type `dtype` (bfloat16 as uint16), rounded to nearest, ties to even.

    Raises:
        ArteError: a value is not finite, before or after rounding; says in which tensor.
    """
    from_bfloat16 = values.dtype == np.uint16
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "F32":
            encoded: NDArray[Any] = widened(values)
            finite = bool(np.isfinite(encoded).all())
        elif dtype == "F16":
            halves = _halves_of(values) if from_bfloat16 else values.astype(np.float16).view(np.uint16)
            encoded = np.ascontiguousarray(halves)
            finite = int((encoded & 0x7FFF).max(initial=0)) < _HALF_MAX_BITS
        else:
            encoded = np.ascontiguousarray(values) if from_bfloat16 else _rounded_to_bfloat16(values)
            finite = int((encoded & 0x7FFF).max(initial=0)) < 0x7F80
    if not finite:
        raise ArteError(
            f"{name}: holds values that are not finite in {dtype}",
            "If the checkpoint itself is sound, write it as BF16; else the training diverged.",
        )
    return encoded


def _halves_of(values: Values) -> NDArray[np.uint16]:
    """Return bfloat16 bits as float16 bits: there are only 65,536 of them, so a table holds each result."""
    table, flat = _half_table(), np.ascontiguousarray(values).reshape(-1)
    out = np.empty(len(flat), np.uint16)
    for start in range(0, len(flat), _WINDOW):
        window = slice(start, start + _WINDOW)
        np.take(table, flat[window], out=out[window], mode="clip")
    return out.reshape(values.shape)


@lru_cache(maxsize=1)
def _half_table() -> NDArray[np.uint16]:
    with np.errstate(over="ignore", invalid="ignore"):
        halves = widened(np.arange(1 << 16, dtype=np.uint16)).astype(np.float16)
    return halves.view(np.uint16)


def _rounded_to_bfloat16(values: Values) -> NDArray[np.uint16]:
    """Return floats as bfloat16 bits; values that are not finite become infinity."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isfinite(values), rounded, 0x7F80).astype(np.uint16)

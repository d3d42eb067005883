"""Write a GGUF file block by block, and change the metadata of one; whole or not at all.

A few megabytes of one tensor are in memory at a time, and the file appears under its name only when its last
byte is on disk, so that a killed run never leaves half a model behind.

`rewrite` copies unchanged pairs as bytes, so values of any type survive, and the tensor data block by block.
Offsets of tensors count from the start of the data, which begins at a multiple of the file's own alignment, so the
tensor infos do not change. A second run with the same keys writes nothing.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from arte_edge.cache import atomic_file, check_free_space
from arte_edge.checkpoint import Values
from arte_edge.errors import ArteError, InputError
from arte_edge.gguf.reader import ARRAY, SCALARS, STRING, TENSOR_TYPES, Field, GgufHeader, read_header

_VERSION, _ALIGNMENT = 3, 32
_TYPE_NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
_HALF_MAX_BITS = 0x7C00  # infinity; above it are the NaNs
_WINDOW = 1 << 20  # values gathered at a time: numpy makes 8 bytes of each index
_FIXED = ("general.alignment", "general.architecture")  # the tensors and every reader depend on them
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_BLOCK_BYTES = 1 << 22


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
    """Write `fields` (``general.architecture`` is `arch`, none if empty) and `tensors` to `out`; return `out`.

    Raises:
        InputError: a value does not fit its type.
        ArteError: the disk is full or not writable, or a weight is not finite in its type.
    """
    if arch:
        fields = {"general.architecture": Field(STRING, arch), **fields}
    infos, offset_bytes = [], 0
    for tensor in tensors:
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        infos.append(_text(tensor.name) + dims + struct.pack("<IQ", _TYPE_NUMBERS[tensor.dtype], offset_bytes))
        offset_bytes += tensor.size_bytes + -tensor.size_bytes % _ALIGNMENT
    pairs = [_pair(key, field) for key, field in fields.items()]
    header = _header(_VERSION, _ALIGNMENT, len(tensors), pairs, b"".join(infos))
    with atomic_file(out) as partial, partial.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            _write_values(file, tensor)
        file.flush()
        os.fsync(file.fileno())
    return out


def _write_values(file: BinaryIO, tensor: Tensor) -> None:
    loaded, written_bytes = tensor.load(), 0
    for block in (loaded,) if isinstance(loaded, np.ndarray) else loaded:
        encoded = encode(block, tensor.dtype, tensor.name)
        written_bytes += file.write(encoded.reshape(-1).view(np.uint8).data)
    if written_bytes != tensor.size_bytes:  # the offsets of all that follow would be wrong
        raise ArteError(f"{tensor.name}: {written_bytes} bytes instead of {tensor.size_bytes}")
    file.write(bytes(-written_bytes % _ALIGNMENT))


def widened(values: Values) -> NDArray[np.float32]:
    """Return a block's values as float32, which holds each of them exactly."""
    if values.dtype == np.uint16:
        bits = values.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return np.ascontiguousarray(values, dtype=np.float32)


def encode(values: Values, dtype: str, name: str) -> NDArray[Any]:
    """Return a block as the numbers of type `dtype` (bfloat16 as uint16), rounded to nearest, ties to even.

    Raises ArteError: a value is not finite, before or after rounding; says in which tensor.
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


@dataclass(frozen=True)
class Rewritten:
    """The result. `changed` is false if the file had this metadata already and was not touched."""

    changed: bool
    sha256: str = ""  # of the new file, if it changed


def rewrite(path: Path, fields: Mapping[str, Field], drop: Iterable[str] = (), *, out: Path | None = None) -> Rewritten:
    """Give the file `path`, or a copy of it, the metadata `fields`, all of it or nothing.

    A key that exists keeps its position; a new one comes last. Memory does not grow with the file.

    Args:
        drop: keys to delete first; one that ends in ``.`` deletes all that begin with it.
        out: write this file and leave `path` as it is.

    Raises:
        InputError: not a GGUF, damaged, or a key or value that it cannot hold.
        ArteError: not enough room for a second copy beside the file, or it cannot be written.
    """
    path = path.resolve()
    out = (out or path).resolve()  # a link stays a link
    for key in fields:
        if key in _FIXED or not _KEY.fullmatch(key) or len(key) > 65535:
            raise InputError(f"{path.name}: the key '{key}' cannot be set", "Use lower_snake words and dots.")
    header = read_header(path, any_tensor_type=True)
    pairs = _merged(header, fields, tuple(drop))
    new = _header(header.version, header.alignment, len(header.tensors), pairs, header.raw_tensor_infos)
    if header.raw == new and out == path:
        return Rewritten(changed=False)
    data_bytes = max(path.stat().st_size - header.data_offset_bytes, 0)
    check_free_space(out.parent, len(new) + data_bytes, f"another copy of {out.name}")
    digest = hashlib.sha256(new)
    with atomic_file(out) as partial, path.open("rb") as old:
        with partial.open("wb") as file:
            file.write(new)
            old.seek(header.data_offset_bytes)
            while block := old.read(_BLOCK_BYTES):
                file.write(block)
                digest.update(block)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, partial)
    return Rewritten(True, digest.hexdigest())


def _merged(header: GgufHeader, fields: Mapping[str, Field], drop: tuple[str, ...]) -> list[bytes]:
    new = dict(fields)
    prefixes = tuple(key for key in drop if key.endswith("."))
    pairs = [
        _pair(key, new.pop(key)) if key in new else raw
        for key, raw in header.raw_pairs.items()
        if key in _FIXED or not (key in drop or key.startswith(prefixes))
    ]
    return pairs + [_pair(key, field) for key, field in new.items()]


def _pair(key: str, field: Field) -> bytes:
    """Return a key-value pair as it is stored in a file."""
    try:
        if field.kind != ARRAY:
            return _text(key) + struct.pack("<I", field.kind) + _encoded(field.kind, [field.value])
        if field.item_kind is None or field.item_kind == ARRAY:
            raise ValueError("an array needs a type of items that is not an array")
        array = struct.pack("<IIQ", ARRAY, field.item_kind, len(field.value))
        return _text(key) + array + _encoded(field.item_kind, field.value)
    except (struct.error, OverflowError, ValueError, TypeError) as error:
        raise InputError(f"{key}: cannot be written as GGUF: {error}") from error


def _encoded(kind: int, values: Sequence[Any]) -> bytes:
    if kind == STRING:
        return b"".join(map(_text, values))
    if kind not in SCALARS:
        raise ValueError(f"{kind} is not a type of values")
    return struct.pack(f"<{len(values)}{SCALARS[kind]}", *values)


def _text(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else bytes(text)
    return struct.pack("<Q", len(raw)) + raw


def _header(version: int, alignment: int, n_tensor: int, pairs: list[bytes], infos: bytes) -> bytes:
    header = b"".join((struct.pack("<4sIQQ", b"GGUF", version, n_tensor, len(pairs)), *pairs, infos))
    return header + bytes(-len(header) % alignment)

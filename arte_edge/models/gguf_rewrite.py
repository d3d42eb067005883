"""Set, replace and delete metadata of a GGUF file; its tensors stay bit for bit.

The head is read pair by pair without being interpreted, so that what is not ours keeps its bytes,
whatever its type. The new head is written to a file beside the old one, the tensor data is copied
behind it block by block, and the name changes hands only when all of it is on the disk. Offsets of
tensors count from the start of the data, which begins at a multiple of the file's own alignment, so
nothing in the tensor records changes. A second run with the same keys writes nothing.

Layout: ggml/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.cache import megabytes, whole_file
from arte_edge.errors import ArteError, InputError
from arte_edge.models.gguf_cursor import ARRAY, SCALARS, STRING, CutShort, GgufCursor
from arte_edge.models.gguf_fields import Field
from arte_edge.models.gguf_types import TENSOR_TYPES

__all__ = ["Rewritten", "encode_field", "rewrite"]

_UINT32 = 4  # GGUF value type
_ALIGNMENT = "general.alignment"
_FIXED = (_ALIGNMENT, "general.architecture")  # what the tensors and every reader depend on
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_MAX_DEPTH = 4  # arrays in arrays: the format allows them, nobody writes them
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Rewritten:
    """What became of the file. `changed` false: it already said all of this and was not touched."""

    changed: bool
    sha256: str = ""  # of the new file, if it changed


@dataclass(frozen=True)
class _Head:
    version: int
    n_tensor: int
    pairs: list[tuple[str, bytes]]  # key; its name, type and value as they stand in the file
    records: bytes  # of the tensors
    alignment: int
    data_start: int


def rewrite(path: Path, fields: Mapping[str, Field], drop: Iterable[str] = ()) -> Rewritten:
    """Give the file `path` the metadata `fields`, all of it or nothing.

    A key that is there keeps its place; a new one comes last. Memory does not grow with the file.

    Args:
        drop: keys to delete first; one that ends in ``.`` stands for all that begin with it.

    Raises:
        InputError: not a GGUF, damaged, or a key or value that it cannot hold.
        ArteError: not enough room for a second copy beside the file, or the disk refuses.
    """
    path = path.resolve()  # a link stays a link
    for key in fields:
        if key in _FIXED or not _KEY.fullmatch(key) or len(key) > 65535:
            raise InputError(f"{path.name}: the key '{key}' cannot be set", "Use lower_snake words and dots.")
    head = _read(path)
    new = _encode(head, _merged(head, fields, tuple(drop)))
    with path.open("rb") as file:
        if file.read(head.data_start) == new:
            return Rewritten(changed=False)
    data_bytes = max(path.stat().st_size - head.data_start, 0)
    free_bytes, need_bytes = shutil.disk_usage(path.parent).free, len(new) + data_bytes
    if free_bytes < need_bytes:
        raise ArteError(
            f"{path.name}: {megabytes(need_bytes)} are needed beside it, {megabytes(free_bytes)} are free",
            "Free some space; the file is as it was.",
        )
    return Rewritten(True, _write(path, new, head.data_start))


def encode_field(field: Field) -> bytes:
    """Return type and value of `field` as they stand in a file.

    Raises:
        ValueError: a type that there is not, or a value that does not fit it.
    """
    if field.kind != ARRAY:
        return struct.pack("<I", field.kind) + _encoded(field.kind, [field.value])
    item_kind = field.item_kind
    if item_kind is None or item_kind == ARRAY:
        raise ValueError("an array needs a type of items that is no array")
    return struct.pack("<IIQ", ARRAY, item_kind, len(field.value)) + _encoded(item_kind, field.value)


def _encoded(kind: int, values: list[Any]) -> bytes:
    if kind == STRING:
        texts = [value.encode() if isinstance(value, str) else bytes(value) for value in values]
        return b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    if kind not in SCALARS:
        raise ValueError(f"{kind} is no type of values")
    try:
        return struct.pack(f"<{len(values)}{SCALARS[kind]}", *values)
    except (struct.error, OverflowError) as error:
        raise ValueError(str(error)) from error


def _merged(head: _Head, fields: Mapping[str, Field], drop: tuple[str, ...]) -> list[bytes]:
    left = dict(fields)
    pairs: list[bytes] = []
    for key, raw in head.pairs:
        if key not in _FIXED and any(
            key == one or (one.endswith(".") and key.startswith(one)) for one in drop
        ):
            continue
        pairs.append(_pair(key, left.pop(key)) if key in left else raw)
    return pairs + [_pair(key, field) for key, field in left.items()]


def _pair(key: str, field: Field) -> bytes:
    name = key.encode()
    try:
        return struct.pack("<Q", len(name)) + name + encode_field(field)
    except (ValueError, TypeError) as error:
        raise InputError(f"{key}: cannot be written as GGUF: {error}") from error


def _encode(head: _Head, pairs: list[bytes]) -> bytes:
    begin = struct.pack("<4sIQQ", b"GGUF", head.version, head.n_tensor, len(pairs))
    text = b"".join((begin, *pairs, head.records))
    return text + bytes(-len(text) % head.alignment)


def _write(path: Path, head: bytes, data_start: int) -> str:
    digest = hashlib.sha256(head)
    with whole_file(path) as partial, path.open("rb") as old:
        with partial.open("wb") as new:
            new.write(head)
            old.seek(data_start)
            while block := old.read(_BLOCK_BYTES):
                new.write(block)
                digest.update(block)
            new.flush()
            os.fsync(new.fileno())
        shutil.copymode(path, partial)
    return digest.hexdigest()


def _read(path: Path) -> _Head:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).head()
    except (ValueError, struct.error) as error:  # an empty file cannot be mapped
        raise InputError(f"{path.name}: not a usable GGUF: {error}", "Make the file again.") from error
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read: {error.strerror or error}") from error


class _Reader(GgufCursor):
    """Walks over the head and keeps its pairs as they stand."""

    def head(self) -> _Head:
        if self.data[:4] != b"GGUF":
            raise ValueError(f"it begins with {self.data[:4]!r}")
        self.skip(4)
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, we know 2 and 3, little-endian")
        n_tensor, n_pair = self.scalar("Q"), self.scalar("Q")
        pairs: dict[str, bytes] = {}
        alignment = 32
        for _ in range(n_pair):
            start = self.at
            key = self.raw_text().decode("utf-8", errors="surrogateescape")
            if key in pairs:
                raise ValueError(f"the key {key} stands in it twice")
            kind = self.scalar("I")
            value_at = self.at
            self._value(kind, 0)
            pairs[key] = self.data[start : self.at]
            if key == _ALIGNMENT:
                if kind != _UINT32:
                    raise ValueError(f"{_ALIGNMENT} is of type {kind}")
                (alignment,) = struct.unpack_from("<I", self.data, value_at)
        if alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"{_ALIGNMENT} is {alignment}")
        start, end_bytes = self.at, 0
        for _ in range(n_tensor):
            self.raw_text()
            n_value = math.prod([self.scalar("Q") for _ in range(self._dimensions())])
            kind, offset_bytes = self.scalar("I"), self.scalar("Q")
            _, block_values, block_bytes = TENSOR_TYPES.get(
                kind, ("", 1, 0)
            )  # a newer type: its place at least
            end_bytes = max(end_bytes, offset_bytes + n_value // block_values * block_bytes)
        records = self.data[start : self.at]
        data_start = self.at + -self.at % alignment
        if n_tensor and data_start + end_bytes > len(self.data):
            raise CutShort
        return _Head(version, n_tensor, list(pairs.items()), records, alignment, data_start)

    def _dimensions(self) -> int:
        if (count := self.scalar("I")) > 4:
            raise ValueError(f"a tensor has {count} dimensions")
        return int(count)

    def _value(self, kind: int, depth: int) -> None:
        if kind == STRING:
            self.raw_text()
        elif kind == ARRAY:
            item_kind, count = self.scalar("I"), self.scalar("Q")
            if item_kind in SCALARS:
                self.skip(struct.calcsize("<" + SCALARS[item_kind]) * count)
                return
            if depth == _MAX_DEPTH:
                raise ValueError("arrays in arrays in arrays")
            for _ in range(count):
                self._value(item_kind, depth + 1)
        elif kind in SCALARS:
            self.skip(struct.calcsize("<" + SCALARS[kind]))
        else:
            raise ValueError(f"the unknown value type {kind}")

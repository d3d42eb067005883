"""Set, replace and delete metadata of a GGUF file; its tensors stay bit for bit.

Pairs that are not changed are copied as bytes, so values of any type survive. The new header is written to a
file beside the old one, the tensor data is copied behind it block by block, and the new file replaces the old
one when it is complete and flushed. Offsets of tensors count from the start of the data, which begins at a
multiple of the file's own alignment, so the tensor infos do not change. A second run with the same keys
writes nothing.
"""

from __future__ import annotations

import hashlib
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
from arte_edge.gguf.reader import Field, GgufHeader, read_header
from arte_edge.gguf.types import ARRAY, SCALARS, STRING

__all__ = ["Rewritten", "encode_field", "rewrite"]

_FIXED = ("general.alignment", "general.architecture")  # the tensors and every reader depend on them
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Rewritten:
    """The result. `changed` is false if the file had this metadata already and was not touched."""

    changed: bool
    sha256: str = ""  # of the new file, if it changed


def rewrite(
    path: Path, fields: Mapping[str, Field], drop: Iterable[str] = (), *, out: Path | None = None
) -> Rewritten:
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
    new = _encoded_header(header, _merged(header, fields, tuple(drop)))
    if header.raw == new and out == path:
        return Rewritten(changed=False)
    data_bytes = max(path.stat().st_size - header.data_offset_bytes, 0)
    free_bytes, need_bytes = shutil.disk_usage(out.parent).free, len(new) + data_bytes
    if free_bytes < need_bytes:
        raise ArteError(
            f"{out.name}: {megabytes(need_bytes)} are needed beside it, {megabytes(free_bytes)} are free",
            "Free some space; the file is unchanged.",
        )
    return Rewritten(True, _write(path, out, new, header.data_offset_bytes))


def encode_field(field: Field) -> bytes:
    """Return type and value of `field` as they are stored in a file.

    Raises:
        ValueError: an unknown type, or a value that does not fit it.
    """
    if field.kind != ARRAY:
        return struct.pack("<I", field.kind) + _encoded(field.kind, [field.value])
    item_kind = field.item_kind
    if item_kind is None or item_kind == ARRAY:
        raise ValueError("an array needs a type of items that is not an array")
    return struct.pack("<IIQ", ARRAY, item_kind, len(field.value)) + _encoded(item_kind, field.value)


def _encoded(kind: int, values: list[Any]) -> bytes:
    if kind == STRING:
        texts = [value.encode() if isinstance(value, str) else bytes(value) for value in values]
        return b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    if kind not in SCALARS:
        raise ValueError(f"{kind} is not a type of values")
    try:
        return struct.pack(f"<{len(values)}{SCALARS[kind]}", *values)
    except (struct.error, OverflowError) as error:
        raise ValueError(str(error)) from error


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
    name = key.encode()
    try:
        return struct.pack("<Q", len(name)) + name + encode_field(field)
    except (ValueError, TypeError) as error:
        raise InputError(f"{key}: cannot be written as GGUF: {error}") from error


def _encoded_header(header: GgufHeader, pairs: list[bytes]) -> bytes:
    begin = struct.pack("<4sIQQ", b"GGUF", header.version, len(header.tensors), len(pairs))
    text = b"".join((begin, *pairs, header.raw_tensor_infos))
    return text + bytes(-len(text) % header.alignment)


def _write(path: Path, out: Path, header: bytes, data_offset_bytes: int) -> str:
    digest = hashlib.sha256(header)
    with whole_file(out) as partial, path.open("rb") as old:
        with partial.open("wb") as new:
            new.write(header)
            old.seek(data_offset_bytes)
            while block := old.read(_BLOCK_BYTES):
                new.write(block)
                digest.update(block)
            new.flush()
            os.fsync(new.fileno())
        shutil.copymode(path, partial)
    return digest.hexdigest()

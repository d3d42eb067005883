"""Everything in the head of a GGUF file, kept so that it can be written again: metadata and tensor shapes.

`gguf_header` checks a file and keeps what describes it; this keeps all of it,
vocabulary included, with the exact type of each value. `gguf.GGUFReader` does the
same in 4 to 14 seconds for the models we use, because it makes a numpy view of
every token; here it is a tenth of a second, which a probe in the middle of a
training run can wait for. Strings stay bytes: a token need not be UTF-8.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from arte_edge.errors import InputError
from arte_edge.models.gguf_cursor import ARRAY, SCALARS, STRING
from arte_edge.models.gguf_header import read_header

__all__ = ["Field", "GgufFields", "read_fields"]


@dataclass(frozen=True)
class Field:
    """One metadata value: a scalar, `bytes` for a string, or a list of either.

    `kind` and `item_kind` are GGUF value types; `item_kind` is set for arrays only.
    """

    kind: int
    value: Any
    item_kind: int | None = None


@dataclass(frozen=True)
class GgufFields:
    """Metadata by key, and the shape of each tensor in row-major order (``[n_out, n_in]``)."""

    path: Path
    architecture: str
    fields: dict[str, Field]
    shapes: dict[str, tuple[int, ...]]

    def number(self, key: str) -> int:
        """Return the integer behind ``<architecture>.<key>``.

        Raises:
            InputError: it is missing, or differs from layer to layer.
        """
        full = f"{self.architecture}.{key}"
        field = self.fields.get(full)
        if field is None or not isinstance(field.value, int):
            raise InputError(
                f"{self.path}: {full} is not one integer", "Use a model whose layers are all alike."
            )
        return field.value


def read_fields(path: Path) -> GgufFields:
    """Return the metadata and tensor shapes of the GGUF file at `path`.

    Raises:
        InputError: as `gguf_header.read_header`, which checks every length first.
    """
    checked = read_header(path)
    with path.open("rb") as file:
        file.seek(8)
        n_tensor, n_field = struct.unpack("<QQ", file.read(16))
        fields = dict(_field(file) for _ in range(n_field))
        shapes = dict(_shape(file) for _ in range(n_tensor))
    return GgufFields(path, checked.architecture, fields, shapes)


def _field(file: BinaryIO) -> tuple[str, Field]:
    key = _string(file).decode("utf-8")
    (kind,) = struct.unpack("<I", file.read(4))
    if kind != ARRAY:
        return key, Field(kind, _values(file, kind, 1)[0])
    item_kind, count = struct.unpack("<IQ", file.read(12))
    return key, Field(kind, _values(file, item_kind, count), item_kind)


def _shape(file: BinaryIO) -> tuple[str, tuple[int, ...]]:
    name = _string(file).decode("utf-8")
    (n_dim,) = struct.unpack("<I", file.read(4))
    shape = tuple(reversed(struct.unpack(f"<{n_dim}Q", file.read(8 * n_dim))))
    file.read(12)  # type and offset of the weights, which are not copied
    return name, shape


def _string(file: BinaryIO) -> bytes:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length)


def _values(file: BinaryIO, kind: int, count: int) -> list[Any]:
    if kind == STRING:
        return [_string(file) for _ in range(count)]
    size_bytes = struct.calcsize("<" + SCALARS[kind])
    return list(struct.unpack(f"<{count}{SCALARS[kind]}", file.read(size_bytes * count)))

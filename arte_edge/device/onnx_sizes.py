"""How many bytes of weights an ONNX graph has, and how many of them only serve look-ups, without loading it.

The file is protocol buffers: fields of ``number << 3 | wire type`` and a value. Weights are skipped
over, so a graph of gigabytes is read in milliseconds, and no onnx package is needed on the device.
Field numbers: onnx/onnx.proto, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arte_edge.errors import InputError

__all__ = ["OnnxSizes", "read_onnx_sizes"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_GRAPH = 7  # of ModelProto
_NODE, _INITIALIZER = 1, 5  # of GraphProto
_NODE_INPUT, _NODE_OP = 1, 4
_DIMS, _DATA_TYPE, _NAME = 1, 2, 8  # of TensorProto
# TensorProto.DataType -> bits of one value
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}


@dataclass(frozen=True)
class OnnxSizes:
    """Bytes of the initializers, and of those that are read a row at a time (an embedding)."""

    weight_bytes: int
    lookup_bytes: int


def read_onnx_sizes(path: Path) -> OnnxSizes:
    """Return what the graph at `path` says of its weights, wherever their data lies.

    Raises:
        InputError: the file cannot be read as ONNX.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _graph_sizes(data)
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not readable as ONNX: {error}", "Export it again.") from error


def _graph_sizes(data: mmap.mmap) -> OnnxSizes:
    counts: dict[str, int] = {}  # name -> bytes
    looked_up: set[str] = set()
    multiplied: set[str] = set()
    for number, start, end in _fields(data, 0, len(data)):
        if number != _GRAPH:
            continue
        for kind, at, stop in _fields(data, start, end):
            if kind == _INITIALIZER:
                name, size_bytes = _tensor(data, at, stop)
                counts[name] = size_bytes
            elif kind == _NODE:
                inputs, op = _node(data, at, stop)
                (looked_up if op.startswith("Gather") else multiplied).update(inputs)
    if not counts:
        raise ValueError("it holds no weights")
    lookup = sum(counts[name] for name in looked_up - multiplied if name in counts)
    return OnnxSizes(sum(counts.values()), lookup)


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield ``(field number, start, end)`` of the values between `at` and `end`; a varint's are its bytes."""
    while at < end:
        key, at = _varint(data, at)
        wire = key & 7
        start = at
        if wire == _BYTES:
            size, start = _varint(data, at)
            at = start + size
        elif wire == _VARINT:
            _, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at > end:
            raise ValueError("cut short")
        yield key >> 3, start, at


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def _tensor(data: mmap.mmap, at: int, end: int) -> tuple[str, int]:
    """Return an initializer's name and its bytes."""
    name, bits, values = "", 32, 1
    for number, start, stop in _fields(data, at, end):
        if number == _DIMS:  # one varint each, or several packed; the two look alike here
            while start < stop:
                size, start = _varint(data, start)
                values *= size
        elif number == _DATA_TYPE:
            bits = _BITS.get(_varint(data, start)[0], 32)
        elif number == _NAME:
            name = data[start:stop].decode(errors="replace")
    return name, values * bits // 8


def _node(data: mmap.mmap, at: int, end: int) -> tuple[list[str], str]:
    """Return a node's input names and its operator."""
    inputs, op = [], ""
    for number, start, stop in _fields(data, at, end):
        if number == _NODE_INPUT:
            inputs.append(data[start:stop].decode(errors="replace"))
        elif number == _NODE_OP:
            op = data[start:stop].decode(errors="replace")
    return inputs, op

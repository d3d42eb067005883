"""How many bytes of weights an ONNX graph has, and how many of them only serve look-ups, without loading it.

Weights are skipped over, so a graph of gigabytes is read in milliseconds, and no onnx package is needed on the device.
Field numbers: onnx/onnx.proto, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

from arte_edge.errors import InputError
from arte_edge.protobuf import fields, varint

__all__ = ["OnnxSizes", "read_onnx_sizes"]

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
    for number, start, end in fields(data, 0, len(data)):
        if number != _GRAPH:
            continue
        for kind, at, stop in fields(data, start, end):
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


def _tensor(data: mmap.mmap, at: int, end: int) -> tuple[str, int]:
    """Return an initializer's name and its bytes."""
    name, bits, values = "", 32, 1
    for number, start, stop in fields(data, at, end):
        if number == _DIMS:  # one varint each, or several packed; the two look alike here
            while start < stop:
                size, start = varint(data, start)
                values *= size
        elif number == _DATA_TYPE:
            bits = _BITS.get(varint(data, start)[0], 32)
        elif number == _NAME:
            name = data[start:stop].decode(errors="replace")
    return name, values * bits // 8


def _node(data: mmap.mmap, at: int, end: int) -> tuple[list[str], str]:
    """Return a node's input names and its operator."""
    inputs, op = [], ""
    for number, start, stop in fields(data, at, end):
        if number == _NODE_INPUT:
            inputs.append(data[start:stop].decode(errors="replace"))
        elif number == _NODE_OP:
            op = data[start:stop].decode(errors="replace")
    return inputs, op

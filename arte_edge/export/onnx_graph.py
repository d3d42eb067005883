"""What an ONNX file says of itself: inputs, outputs, and the tensors that lie in other files.

Read with the `onnx` library and without the weights, so that a file of any size is judged in
seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from arte_edge.errors import InputError

__all__ = ["ExternalTensor", "Graph", "external_problems", "read_graph"]

Shape = tuple[int | str, ...]
# How much a writer may add behind the last tensor to end on a page.
_PADDING_BYTES = 65_536


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose bytes lie in another file. `need_bytes` follows from its shape and type."""

    name: str
    location: str
    offset: int
    length: int
    need_bytes: int


@dataclass(frozen=True)
class Graph:
    """The outside of an ONNX model: what it takes and gives, by name, with shapes (a name: any size)."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    externals: tuple[ExternalTensor, ...]
    domains: tuple[str, ...]
    op_types: dict[str, int]


def read_graph(path: Path) -> Graph:
    """Return the outside of the model in `path`.

    Raises:
        InputError: the file cannot be parsed.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is no public class
        raise InputError(f"{path} is no readable ONNX file: {error}", "Export or copy it again.") from error
    op_types: dict[str, int] = {}
    for node in model.graph.node:
        op_types[node.op_type] = op_types.get(node.op_type, 0) + 1
    held = {tensor.name for tensor in model.graph.initializer}
    return Graph(
        inputs={value.name: _shape(value) for value in model.graph.input if value.name not in held},
        outputs={value.name: _shape(value) for value in model.graph.output},
        externals=tuple(
            _external(tensor)
            for tensor in model.graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        ),
        domains=tuple(sorted(row.domain or "ai.onnx" for row in model.opset_import)),
        op_types=op_types,
    )


def _shape(value: Any) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims)


def _external(tensor: Any) -> ExternalTensor:
    import onnx

    entries = {entry.key: entry.value for entry in tensor.external_data}
    four_bits = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    count = math.prod(tensor.dims)
    item_bytes = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    need = (count + 1) // 2 if tensor.data_type in four_bits else count * item_bytes
    offset = int(entries.get("offset", 0))
    return ExternalTensor(
        tensor.name, entries.get("location", ""), offset, int(entries.get("length", need)), need
    )


def external_problems(path: Path, graph: Graph) -> list[str]:
    """Return what is wrong with the files that hold the tensors of the model in `path`.

    Each file must lie beside the model, be large enough for every tensor in it, and end with the last.
    """
    problems: list[str] = []
    ends: dict[str, int] = {}
    for tensor in graph.externals:
        plain = PurePosixPath(tensor.location)
        if not tensor.location or plain.is_absolute() or plain.name != tensor.location:
            problems.append(
                f"{path.name}: {tensor.name} lies in '{tensor.location}', which is no plain file name"
            )
        elif tensor.length != tensor.need_bytes:
            problems.append(
                f"{path.name}: {tensor.name} has {tensor.length} bytes in {tensor.location}, "
                f"its shape needs {tensor.need_bytes}"
            )
        else:
            ends[tensor.location] = max(ends.get(tensor.location, 0), tensor.offset + tensor.length)
    for name, end in sorted(ends.items()):
        file = path.with_name(name)
        if not file.is_file():
            problems.append(f"{name}, which holds tensors of {path.name}, is missing")
        elif not end <= file.stat().st_size <= end + _PADDING_BYTES:
            problems.append(f"{name} has {file.stat().st_size} bytes, the tensors in it end at {end}")
    return problems

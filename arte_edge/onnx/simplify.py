"""Remove shape arithmetic from an exported graph.

Tracing writes every ``view`` and ``expand`` as several nodes that compute a shape. A decoder has thousands of
them; for one token they cost as much as the weights. Almost all results are known in advance: a constant,
"unchanged", or "the rest", which ONNX can express (0 and -1 in Reshape, 1 in Expand).

onnxruntime's symbolic shape inference computes the sizes; those that are equal for every batch, length and
past are replaced. Only standard operators are changed and none is added, so the file stays portable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arte_edge.cache import atomic_file
from arte_edge.private_apis import missing

_FOREVER = 2**31 - 1  # onnxruntime's inference clips larger Slice ends to this
_LARGEST_SHAPE = 16  # entries of a tensor that may be a shape


def reshape_target(result: Sequence[Any], shape: Sequence[Any]) -> list[int] | None:
    """Return constants for a Reshape of `shape` to `result`, None if more than one size is unknown.

    Sizes are numbers, or symbols (anything that is not an int) if they vary.
    """
    target, unknown = [], 0
    for i, size in enumerate(result):
        if isinstance(size, int) and size > 0:
            target.append(size)
        elif not isinstance(size, int) and i < len(shape) and shape[i] == size:
            target.append(0)  # unchanged
        elif size == 0:
            return None  # means "unchanged" or "empty", depending on an attribute
        else:
            target.append(-1)  # the rest
            unknown += 1
    return target if unknown <= 1 else None


def expand_target(result: Sequence[Any], shape: Sequence[Any]) -> list[int] | None:
    """Return constants for an Expand of `shape` to `result`, None if it expands a varying size."""
    offset = len(result) - len(shape)
    target = []
    for i, size in enumerate(result):
        if isinstance(size, int) and size > 0:
            target.append(size)
        elif i >= offset and shape[i - offset] == size:
            target.append(1)
        else:
            return None
    return target


def simplify(path: Path) -> tuple[int, int]:
    """Remove shape arithmetic from the model in `path`, in place; return the numbers of nodes before and after."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    before = len(model.graph.node)
    if missing(__name__):
        return before, before
    values, shapes = _symbols(model)
    skipped: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Slice" and _keeps_all(node, values, shapes):
            skipped[node.output[0]] = node.input[0]
        elif node.op_type in ("Reshape", "Expand") and node.input[1] in values:
            rule = reshape_target if node.op_type == "Reshape" else expand_target
            shape = shapes.get(node.input[0])
            target = None if shape is None else rule(values[node.input[1]], shape)
            if target is not None:
                node.input[1] = _constant(model, target)
        elif node.op_type == "Slice":
            for i, name in enumerate(node.input):
                row = values.get(name) if i else None
                if row and all(isinstance(size, int) and abs(size) < _FOREVER for size in row):
                    node.input[i] = _constant(model, row)
    _bypass(model, skipped)
    _remove_unused(model)
    with atomic_file(path) as partial:
        onnx.save(model, str(partial))
    return before, len(model.graph.node)


def _symbols(model: Any) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Return the entries of each small integer vector, and each tensor's shape: ints, or text if they vary.

    The class has no public access to its results; onnxruntime's own optimizers read them in the same way.
    """
    import onnx
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference, get_shape_from_value_info

    inference: Any = SymbolicShapeInference(_FOREVER, auto_merge=True, guess_output_rank=False, verbose=0)
    inference._preprocess(_without_weights(model))
    while inference.run_:
        inference._infer_impl()
    values = {
        name: [_plain(size) for size in data]
        for name, data in inference.sympy_data_.items()
        if _is_vector(data) and len(data) <= _LARGEST_SHAPE
    }
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) == 1 and tensor.dims[0] <= _LARGEST_SHAPE:
            values[tensor.name] = [int(size) for size in onnx.numpy_helper.to_array(tensor)]
    shapes = {
        name: [_plain(size) for size in shape]
        for name, info in inference.known_vi_.items()
        if (shape := get_shape_from_value_info(info)) is not None
    }
    return values, shapes


def _without_weights(model: Any) -> Any:
    """Return a copy of `model` in which tensors that cannot be shapes are inputs without data."""
    import onnx

    graph = onnx.GraphProto(name=model.graph.name)
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _LARGEST_SHAPE and tensor.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        else:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(info)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _is_vector(data: Any) -> bool:
    return isinstance(data, list) or (getattr(data, "ndim", 0) == 1 and data.dtype.kind in "iu")


def _plain(size: Any) -> int | str:
    """Return a size as int if it is one, else as text, in which equal expressions are equal."""
    text = str(size)
    return int(text) if text.lstrip("-").isdigit() else text


def _keeps_all(node: Any, values: Mapping[str, list[Any]], shapes: Mapping[str, list[Any]]) -> bool:
    """Return whether a Slice keeps everything along its one axis: from 0 to the size, in steps of 1."""
    shape = shapes.get(node.input[0])
    if shape is None or len(node.input) < 4 or any(name not in values for name in node.input[1:]):
        return False
    starts, ends, axes, *steps = (values[name] for name in node.input[1:])
    if starts != [0] or len(axes) != 1 or not isinstance(axes[0], int) or steps not in ([], [[1]]):
        return False
    return bool(ends == [shape[axes[0]]])


def _constant(model: Any, row: Sequence[int]) -> str:
    """Return the name of an initializer with the values `row`, added if necessary."""
    import numpy as np
    import onnx

    name = "shape_" + "_".join(str(size).replace("-", "m") for size in row)
    if not any(tensor.name == name for tensor in reversed(model.graph.initializer)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(row, np.int64), name))
    return name


def _bypass(model: Any, skipped: Mapping[str, str]) -> None:
    """Replace uses of outputs in `skipped` by that node's input, except outputs of the graph."""
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            while name in skipped and name not in outputs:
                name = skipped[name]
            node.input[i] = name


def _remove_unused(model: Any) -> None:
    """Remove nodes and initializers that no output depends on. Nodes are in topological order."""
    used = {value.name for value in model.graph.output}
    nodes = []
    for node in reversed(model.graph.node):
        if used.intersection(node.output):
            used.update(name for name in node.input if name)
            nodes.append(node)
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(reversed(nodes))
    if len(tensors) != len(model.graph.initializer):
        del model.graph.initializer[:]
        model.graph.initializer.extend(tensors)

"""An exported graph without the arithmetic on its own shapes.

Tracing writes every ``view`` and ``expand`` as a small program: take the shape, pick a number, put
it beside others, reshape to that. A decoder has thousands of such nodes; on one token they cost
as much as the weights do. Almost all of them say something that is known beforehand: a constant,
"as it is", or "what is left", which ONNX has words for (0 and -1 of Reshape, 1 of Expand).

The numbers are followed through the graph by onnxruntime's symbolic shape inference; this module
only replaces what came out the same for every batch, length and past. Only standard operators are
touched and none is added, so the file stays as portable as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["expand_target", "reshape_target", "slim"]

_FOREVER = 2**31 - 1  # onnxruntime's inference clips larger Slice ends to this
_LARGEST_SHAPE = 16  # entries of a tensor that may be a shape


def reshape_target(wanted: Sequence[Any], shape: Sequence[Any]) -> list[int] | None:
    """Return constants for a Reshape of `shape` to `wanted`, None if more than one size stays unknown.

    Sizes are numbers, or symbols (anything that is no int) where they vary.
    """
    target, unknown = [], 0
    for i, size in enumerate(wanted):
        if isinstance(size, int) and size > 0:
            target.append(size)
        elif not isinstance(size, int) and i < len(shape) and shape[i] == size:
            target.append(0)  # as it is
        elif size == 0:
            return None  # means "as it is" or "nothing", by an attribute
        else:
            target.append(-1)  # what is left
            unknown += 1
    return target if unknown <= 1 else None


def expand_target(wanted: Sequence[Any], shape: Sequence[Any]) -> list[int] | None:
    """Return constants for an Expand of `shape` to `wanted`, None if it spreads along a size that varies."""
    offset = len(wanted) - len(shape)
    target = []
    for i, size in enumerate(wanted):
        if isinstance(size, int) and size > 0:
            target.append(size)
        elif i >= offset and shape[i - offset] == size:
            target.append(1)
        else:
            return None
    return target


def slim(source: Path, out: Path) -> tuple[int, int]:
    """Write the model in `source` to `out` without its shape arithmetic; return the nodes before and after.

    Weights that lie in other files must lie beside `out` too.
    """
    import onnx

    model = onnx.load(str(source), load_external_data=False)
    before = len(model.graph.node)
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
    onnx.save(model, str(out))
    return before, len(model.graph.node)


def _symbols(model: Any) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Return the entries of each small integer tensor, and each tensor's shape; ints, or symbols where they vary."""
    import onnx
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    lean = onnx.ModelProto()
    lean.CopyFrom(model)
    inference: Any = SymbolicShapeInference(_FOREVER, True, False, 0)
    inference._preprocess(lean)
    while inference.run_:
        inference._infer_impl()
    values = {
        name: [_plain(size) for size in data]
        for name, data in inference.sympy_data_.items()
        if isinstance(data, list) and len(data) <= _LARGEST_SHAPE
    }
    shapes = {}
    for name in inference.known_vi_:
        shape = inference._try_get_shape_from_name(name) if hasattr(inference, "_try_get_shape_from_name") else None
        shape = shape if shape is not None else _shape(inference, name)
        if shape is not None:
            shapes[name] = [_plain(size) for size in shape]
    return values, shapes

"""Removing shape arithmetic from a graph: the rules, and a small graph that computes the same without it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arte_edge.onnx.simplify import expand_target, reshape_target, simplify


@pytest.mark.parametrize(
    ("result", "shape", "target"),
    [
        (["b", "s", 9, 64], ["b", "s", 576], [0, 0, 9, 64]),
        (["b", 9, "p + s", 64], ["b", 3, 3, "p + s", 64], [0, 9, -1, 64]),
        (["b", "s", -1], ["b", "s", 9, 64], [0, 0, -1]),
        ([-1], ["b", 4], [-1]),
        (["s", "b"], ["b", "s"], None),
        (["b", "s", -1], ["s", "b", 4], None),
        ([0, 4], ["b", 4], None),
    ],
)
def test_the_constants_of_a_reshape(result: list[Any], shape: list[Any], target: list[int] | None) -> None:
    assert reshape_target(result, shape) == target


@pytest.mark.parametrize(
    ("result", "shape", "target"),
    [
        (["b", 3, 3, "t", 64], ["b", 3, 1, "t", 64], [1, 3, 3, 1, 1]),
        ([2, "b", 4], ["b", 4], [2, 1, 4]),
        (["b", 4], [1, 4], None),
        ([-1, 4], ["b", 4], None),
    ],
)
def test_the_constants_of_an_expand(result: list[Any], shape: list[Any], target: list[int] | None) -> None:
    found = expand_target(result, shape)
    # 1 keeps a size, so it may replace an equal number too
    assert found == target or (found is not None and target is not None and np_expand(found, shape) == result)


def np_expand(target: Sequence[int], shape: Sequence[Any]) -> list[Any]:
    shape = [1] * (len(target) - len(shape)) + list(shape)
    return [size if new == 1 else new for new, size in zip(target, shape, strict=True)]


def traced(path: Path) -> Path:
    """Write the traced graph of ``x.view(b, s, 2, 4).transpose(1, 2)[:, :, :s]`` repeated to 6 heads."""
    from onnx import TensorProto, checker, helper, numpy_helper, save

    def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
        return helper.make_node(kind, inputs.split(), [output], **attributes)

    nodes = [
        node("Shape", "x", "shape"),
        node("Gather", "shape zero", "b", axis=0),
        node("Gather", "shape one", "s", axis=0),
        node("Unsqueeze", "b zeros", "b1"),
        node("Unsqueeze", "s zeros", "s1"),
        node("Concat", "b1 s1 two four", "view", axis=0),
        node("Reshape", "x view", "heads"),
        node("Transpose", "heads", "turned", perm=[0, 2, 1, 3]),
        node("Slice", "turned zeros s1 two_axis", "sliced"),
        node("Unsqueeze", "sliced two_axis", "with_group"),
        node("Concat", "b1 two three s1 four", "many", axis=0),
        node("Expand", "with_group many", "repeated"),
        node("Concat", "b1 six s1 four", "six_heads", axis=0),
        node("Reshape", "repeated six_heads", "y"),
    ]
    numbers = {"zero": 0, "one": 1, "zeros": [0], "two": [2], "three": [3], "four": [4], "six": [6], "two_axis": [2]}
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["batch", "length", 8]), ("y", ["batch", 6, "length", 4]))
    ]
    graph = helper.make_graph(nodes, "traced", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    checker.check_model(model)
    save(model, str(path))
    return path


def test_a_traced_graph_computes_the_same_without_its_shape_arithmetic(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    path = traced(tmp_path / "model.onnx")
    inputs = [np.random.default_rng(7).normal(size=size).astype(np.float32) for size in ((1, 5, 8), (3, 2, 8))]
    expected = [onnxruntime.InferenceSession(path).run(None, {"x": x})[0] for x in inputs]
    assert simplify(path) == (14, 5)
    kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert kinds == ["Reshape", "Transpose", "Unsqueeze", "Expand", "Reshape"]
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(path)
    for x, y in zip(inputs, expected, strict=True):
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], y)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]

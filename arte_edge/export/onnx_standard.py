"""Operators that only onnxruntime knows under ONNX's own name, renamed to the standard ones.

onnxruntime-genai's builder writes RMS normalization as ``SimplifiedLayerNormalization`` in the
domain of standard operators, where ONNX has no such operator: `onnx.checker` refuses the file,
and so does every tool but onnxruntime. Since opset 23 the standard has the same operator, with
the same attributes, as ``RMSNormalization`` (https://onnx.ai/onnx/operators/onnx__RMSNormalization.html).
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["standardize"]

_OPSET = 23
_OLD, _NEW = "SimplifiedLayerNormalization", "RMSNormalization"
_ATTRIBUTES = {"axis", "epsilon", "stash_type"}


def standardize(path: Path) -> int:
    """Rename the operators of the model in `path`, whose weights lie in other files; return how many.

    A node that uses more than the two operators share (a second output) is left as it is.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    changed = 0
    for node in model.graph.node:
        if node.op_type != _OLD or node.domain not in ("", "ai.onnx") or len(node.output) != 1:
            continue
        if {attribute.name for attribute in node.attribute} <= _ATTRIBUTES:
            node.op_type = _NEW
            changed += 1
    if changed:
        for row in model.opset_import:
            if row.domain in ("", "ai.onnx"):
                row.version = max(row.version, _OPSET)
        path.write_bytes(model.SerializeToString(deterministic=True))
    return changed

"""Types for single tensors, from a recipe's patterns to the exact names in one file.

A pattern is one of
    token_embd                      a tensor's name or a dotted part of it
    blk.*.attn_v.weight             a glob over the whole name (``.weight`` may be left off)
    /blk\\.[0-3]\\.ffn_(up|down)/   a regular expression between slashes, searched for
The first pattern that matches a tensor decides. One that matches nothing is an error:
a misspelt override would otherwise be a quantization that nobody asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from arte_edge.errors import InputError, nearest
from arte_edge.export.gguf.quant_types import tensor_type
from arte_edge.export.gguf.tensor_table import TensorInfo

__all__ = ["resolve_overrides"]


def resolve_overrides(overrides: Mapping[str, str], tensors: Sequence[TensorInfo]) -> dict[str, str]:
    """Return tensor name -> tensor type ("Q6_K") for the tensors that a pattern matches.

    Only matrices can be given a type; llama.cpp keeps norms and biases as they are.

    Raises:
        InputError: an unknown type, a broken expression, or a pattern that matches no matrix.
    """
    names = [tensor.name for tensor in tensors if _may_be_quantized(tensor)]
    types: dict[str, str] = {}
    for pattern, wanted in overrides.items():
        label, _ = tensor_type(wanted)
        matched = [name for name in names if _matches(pattern, name)]
        if not matched:
            parts = {part for name in names for part in name.split(".")} - {"blk", "weight"}
            raise InputError(
                f"The override '{pattern}' matches no matrix of the model", nearest(pattern, parts)
            )
        for name in matched:
            types.setdefault(name, label)
    return types


def _may_be_quantized(tensor: TensorInfo) -> bool:
    return len(tensor.shape) > 1 and tensor.name.endswith(".weight") and "_norm." not in tensor.name


def _matches(pattern: str, name: str) -> bool:
    if len(pattern) > 2 and pattern.startswith("/") and pattern.endswith("/"):
        try:
            return re.search(pattern[1:-1], name) is not None
        except re.error as error:
            raise InputError(f"The override '{pattern}' is not a regular expression: {error}") from error
    stem = name.removesuffix(".weight")
    return fnmatchcase(name, pattern) or fnmatchcase(stem, pattern) or pattern in name.split(".")

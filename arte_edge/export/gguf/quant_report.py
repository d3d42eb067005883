"""What a quantized file really holds, read back from the file itself.

The name of a quantization promises little: rows that 256 does not divide get another
type (most of SmolLM2-135M and Qwen2.5-0.5B), and mixes vary with the model and with
the importance matrix.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from arte_edge.export.gguf.imatrix_file import Imatrix
from arte_edge.export.gguf.quant_types import QuantType, quality_warning
from arte_edge.export.gguf.tensor_table import TensorInfo, TensorTable
from arte_edge.models.gguf_types import TENSOR_TYPES

__all__ = ["PLAIN_TYPES", "QuantReport", "make_report"]

PLAIN_TYPES = ("F32", "F16", "BF16")
_BLOCK_VALUES = {label: block for label, block, _ in TENSOR_TYPES.values()}
# llama.cpp warns: "blk.0.attn_q.weight  - ncols    576 not divisible by 256 (required for type    q4_K) -> falling …"
_FALLBACK = re.compile(r"(\S+) +- ncols +\d+ not divisible by +\d+ \(required for type +(\w+)\)")


@dataclass(frozen=True)
class QuantReport:
    """What the written file holds.

    `bits_per_weight` counts the tensors' bytes against all weights, norms included. `fallbacks` are
    "NAME: WANTED -> GOT" for tensors whose rows the wanted type's blocks do not divide, where
    WANTED may be "blocks of 256". `warnings` are sentences that a user should see.
    """

    type: str
    size_bytes: int
    bits_per_weight: float
    tensor_types: dict[str, int]
    fallbacks: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...] = ()


def make_report(
    quant: QuantType,
    overrides: Mapping[str, str],
    before: TensorTable,
    after: TensorTable,
    imatrix: Imatrix | None,
    log: str,
    size_bytes: int,
    seconds: float,
) -> QuantReport:
    """Return the report on `after`, which llama.cpp made of `before` while it said `log`."""
    written = after.tensors.values()
    n_value = sum(tensor.n_value for tensor in written)
    return QuantReport(
        type=quant.name,
        size_bytes=size_bytes,
        bits_per_weight=8 * sum(tensor.size_bytes for tensor in written) / n_value,
        tensor_types=dict(Counter(tensor.type for tensor in written).most_common()),
        fallbacks=_fallbacks(quant, overrides, before, after, log),
        seconds=seconds,
        warnings=tuple(_warnings(quant, overrides, after, imatrix, n_value)),
    )


def _fallbacks(
    quant: QuantType, types: Mapping[str, str], before: TensorTable, after: TensorTable, log: str
) -> tuple[str, ...]:
    """Return the tensors that did not get the type they were meant to have because of their shape."""
    wanted = {name: label.upper() for name, label in _FALLBACK.findall(log)}
    found = []
    for name, tensor in after.tensors.items():
        block = _BLOCK_VALUES.get(types.get(name, quant.default), 1)
        if name not in wanted and _is_smaller_block(block, tensor, before.tensors[name]):
            wanted[name] = f"blocks of {block}"  # llama.cpp says nothing of a tied output matrix
        if name in wanted:
            found.append(f"{name}: {wanted[name]} -> {tensor.type}")
    return tuple(found)


def _is_smaller_block(block: int, tensor: TensorInfo, source: TensorInfo) -> bool:
    changed = tensor.type != source.type
    return changed and block > 32 and tensor.row_values % block != 0 and _BLOCK_VALUES[tensor.type] < block


def _warnings(
    quant: QuantType, types: Mapping[str, str], after: TensorTable, matrix: Imatrix | None, n_parameter: int
) -> Iterator[str]:
    if (known := quality_warning(quant, n_parameter)) is not None:
        yield known
    for name, label in types.items():
        if _BLOCK_VALUES[label] <= 32 and after.tensors[name].type != label:
            yield f"llama.cpp left {name} as {after.tensors[name].type}; the override asked for {label}."
    if matrix is None:
        return
    blocks = [
        t.name for t in after.tensors.values() if t.name.startswith("blk.") and t.type not in PLAIN_TYPES
    ]
    without = [name for name in blocks if name not in matrix.sums]
    if without:
        yield f"The importance matrix has nothing on {len(without)} of {len(blocks)} matrices, {without[0]} first."

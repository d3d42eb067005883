"""A 16-bit GGUF file to a quantized one: checked beforehand, written whole or not at all, read back.

llama.cpp does the arithmetic. What it would reject late, ignore silently or crash on is rejected here before it
starts, and no path of this machine gets into the metadata. The name of a quantization promises little: rows
that 256 does not divide get another type (most of SmolLM2-135M and Qwen2.5-0.5B), and mixes vary with the model
and the importance matrix. So the report is read back from the file itself.

Types of single tensors are given by patterns; the first that matches a tensor decides:
    token_embd                      a tensor's name or a dotted part of it
    blk.*.attn_v.weight             a glob over the whole name (``.weight`` may be omitted)
    /blk\\.[0-3]\\.ffn_(up|down)/   a regular expression between slashes, searched for
A pattern that matches nothing is an error: a misspelt override would otherwise be silently ignored.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

from arte_edge.cache import whole_file
from arte_edge.errors import ArteError, InputError, nearest
from arte_edge.extras import need
from arte_edge.gguf.imatrix import Imatrix, base_name, read_imatrix
from arte_edge.gguf.quantize_worker import QuantJob, run_job
from arte_edge.gguf.reader import GgufHeader, TensorInfo, read_header, read_model_header
from arte_edge.gguf.types import (
    FULL_WIDTH,
    NEEDS_IMATRIX,
    TENSOR_TYPES,
    QuantType,
    find_type,
    quality_warning,
    tensor_type,
)
from arte_edge.threads import thread_count

__all__ = ["QuantReport", "quantize", "resolve_overrides"]

_BLOCK_VALUES = {label: block for label, block, _ in TENSOR_TYPES.values()}
# llama.cpp warns: "blk.0.attn_q.weight  - ncols    576 not divisible by 256 (required for type    q4_K) -> falling …"
_FALLBACK = re.compile(r"(\S+) +- ncols +\d+ not divisible by +\d+ \(required for type +(\w+)\)")


@dataclass(frozen=True)
class QuantReport:
    """The content of the written file.

    `bits_per_weight` counts the tensors' bytes against all weights, norms included. `fallbacks` are
    "NAME: REQUESTED -> ACTUAL" for tensors whose rows the requested type's blocks do not divide, where
    REQUESTED may be "blocks of 256". `warnings` are messages for the user.
    """

    type: str
    size_bytes: int
    bits_per_weight: float
    tensor_types: dict[str, int]
    fallbacks: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...] = ()


def quantize(
    source: Path,
    out: Path,
    type: str,
    *,
    imatrix: Path | None = None,
    overrides: Mapping[str, str] = MappingProxyType({}),
    threads: int | None = None,
) -> QuantReport:
    """Write the 16-bit or 32-bit model `source` to `out` as `type` ("Q4_K_M"); `out` appears whole or not at all.

    Args:
        imatrix: an importance matrix in GGUF form (`imatrix.collect`, or llama.cpp's own).
        overrides: pattern -> tensor type, see above; the first match decides.
        threads: all that this process may use unless given. The result does not depend on it.

    Raises:
        InputError: an unknown type or override, a source that is quantized already, a type that
            needs an importance matrix without one, or a matrix of another model.
        ArteError: llama.cpp cannot quantize it, a package is missing, or the disk is full.
    """
    quant = find_type(type)
    need("gguf", "Quantizing")
    before = _read_source(source)
    types = resolve_overrides(overrides, list(before.tensors.values()))
    matrix = None if imatrix is None else read_imatrix(imatrix)
    _check_request(quant, types, before, matrix, imatrix)
    started = time.monotonic()
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with whole_file(out, partial):
        for left_over in out.parent.glob(f".{_glob_safe(out.name)}.*.partial"):
            left_over.unlink(missing_ok=True)
        job = QuantJob(
            source=str(source.absolute()),
            out=str(partial.absolute()),
            number=quant.number,
            threads=thread_count(threads),
            imatrix=None if imatrix is None else str(imatrix.absolute()),
            tensor_types={name: tensor_type(label)[1] for name, label in types.items()},
            metadata=_metadata(before, matrix, imatrix),
        )
        log = _run(job, out)
        after = _read_written(partial, before, out)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        size_bytes = partial.stat().st_size
    return _report(quant, types, before, after, matrix, log, size_bytes, time.monotonic() - started)


def _read_source(source: Path) -> GgufHeader:
    header = read_model_header(source)  # rejects adapters, vocabularies, pieces of a split model
    done = [tensor for tensor in header.tensors.values() if tensor.type not in FULL_WIDTH]
    if done:
        raise InputError(
            f"{source}: is quantized already ({done[0].name} is {done[0].type})",
            "Quantize from a file of 16 or 32 bits: a second rounding adds to the first.",
        )
    return header


def _check_request(
    quant: QuantType, types: Mapping[str, str], model: GgufHeader, matrix: Imatrix | None, path: Path | None
) -> None:
    """Reject early what llama.cpp would reject late, ignore silently, or crash on."""
    if types and not quant.is_quantized:
        raise InputError(
            f"Overrides have no effect on {quant.name}", "Choose a quantized type, or drop them."
        )
    hint = "Collect one first (arte_edge.gguf.imatrix), or choose IQ4_XS, Q3_K_M or a larger type."
    if matrix is None and quant.needs_imatrix:
        raise InputError(f"{quant.name} needs an importance matrix", hint)
    for name, label in types.items():
        if label in NEEDS_IMATRIX and (matrix is None or name not in matrix.sums):
            raise InputError(f"{name} as {label} needs an importance matrix with that tensor", hint)
    if matrix is None:
        return
    for name, sums in matrix.sums.items():
        tensor = model.tensors.get(name)
        if tensor is not None and sums.size != tensor.n_value // tensor.shape[-2]:
            raise InputError(
                f"{path}: has {sums.size} columns for {name}, the model {tensor.row_values}", _OTHER_MODEL
            )
    if not any(name in model.tensors for name in matrix.sums):
        raise InputError(f"{path}: names no tensor of {model.path.name}", _OTHER_MODEL)


_OTHER_MODEL = "The importance matrix is another model's: collect one from this model's checkpoint."


def _metadata(model: GgufHeader, matrix: Imatrix | None, path: Path | None) -> dict[str, str | int]:
    """Return the keys that ``llama-quantize`` writes about the matrix, with names in place of paths.

    What the source says about an earlier matrix is no longer true (and may hold a path), so it is blanked.
    """
    pairs: dict[str, str | int] = {
        key: 0 if isinstance(value, int) else ""
        for key, value in model.metadata.items()
        if key.startswith("quantize.imatrix.") and isinstance(value, int | str)
    }
    if matrix is not None and path is not None:
        pairs["quantize.imatrix.file"] = base_name(path.name)
        pairs["quantize.imatrix.dataset"] = base_name(matrix.datasets[0]) if matrix.datasets else ""
        pairs["quantize.imatrix.entries_count"] = len(matrix.sums)
        pairs["quantize.imatrix.chunks_count"] = matrix.chunk_count
    return pairs


def _run(job: QuantJob, out: Path) -> str:
    try:
        return run_job(job)
    except ArteError as error:
        if shutil.disk_usage(out.parent).free < 1_000_000:
            raise ArteError(
                f"{out}: the disk is full", "Free some space or choose another folder."
            ) from error
        raise


def _read_written(partial: Path, before: GgufHeader, out: Path) -> GgufHeader:
    """Return the header of the written file if its tensors are those of the source; this also detects a full disk."""
    try:
        after = read_header(partial)
        shapes = after.shapes
        missing = [name for name, shape in before.shapes.items() if shapes.get(name) != shape]
    except InputError as error:
        raise ArteError(
            f"{out}: was not written whole ({error.message})", "Look for a full disk, then try again."
        ) from error
    if missing or len(after.tensors) != len(before.tensors):
        raise ArteError(
            f"{out}: the tensors written are not the source's", "Please report this with the model."
        )
    return after


def _glob_safe(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def resolve_overrides(overrides: Mapping[str, str], tensors: Sequence[TensorInfo]) -> dict[str, str]:
    """Return tensor name -> tensor type ("Q6_K") for the tensors that a pattern matches.

    Only matrices can be given a type; llama.cpp keeps norms and biases as they are.

    Raises:
        InputError: an unknown type, a broken expression, or a pattern that matches no matrix.
    """
    names = [tensor.name for tensor in tensors if _may_be_quantized(tensor)]
    types: dict[str, str] = {}
    for pattern, requested in overrides.items():
        label, _ = tensor_type(requested)
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
    short = name.removesuffix(".weight")
    return fnmatchcase(name, pattern) or fnmatchcase(short, pattern) or pattern in name.split(".")


def _report(
    quant: QuantType,
    overrides: Mapping[str, str],
    before: GgufHeader,
    after: GgufHeader,
    imatrix: Imatrix | None,
    log: str,
    size_bytes: int,
    seconds: float,
) -> QuantReport:
    """Return the report on `after`, which llama.cpp made from `before` with the messages `log`."""
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
    quant: QuantType, types: Mapping[str, str], before: GgufHeader, after: GgufHeader, log: str
) -> tuple[str, ...]:
    """Return the tensors that got another type than requested because of their shape."""
    requested = {name: label.upper() for name, label in _FALLBACK.findall(log)}
    found = []
    for name, tensor in after.tensors.items():
        block = _BLOCK_VALUES.get(types.get(name, quant.default), 1)
        if name not in requested and _is_smaller_block(block, tensor, before.tensors[name]):
            requested[name] = f"blocks of {block}"  # llama.cpp does not report a tied output matrix
        if name in requested:
            found.append(f"{name}: {requested[name]} -> {tensor.type}")
    return tuple(found)


def _is_smaller_block(block: int, tensor: TensorInfo, source: TensorInfo) -> bool:
    changed = tensor.type != source.type
    return changed and block > 32 and tensor.row_values % block != 0 and _BLOCK_VALUES[tensor.type] < block


def _warnings(
    quant: QuantType, types: Mapping[str, str], after: GgufHeader, matrix: Imatrix | None, n_parameter: int
) -> Iterator[str]:
    if (known := quality_warning(quant, n_parameter)) is not None:
        yield known
    for name, label in types.items():
        if _BLOCK_VALUES[label] <= 32 and after.tensors[name].type != label:
            yield f"llama.cpp left {name} as {after.tensors[name].type}; the override requests {label}."
    if matrix is None:
        return
    blocks = [
        t.name for t in after.tensors.values() if t.name.startswith("blk.") and t.type not in FULL_WIDTH
    ]
    without = [name for name in blocks if name not in matrix.sums]
    if without:
        yield f"The importance matrix has no data for {len(without)} of {len(blocks)} matrices, {without[0]} first."

"""A 16-bit GGUF file to a quantized one: checked beforehand, written whole or not at all, read back.

llama.cpp does the arithmetic. What it would refuse late, ignore silently or die of is
refused here before it starts, and no path of this machine gets into the metadata.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from arte_edge.cache import whole_file
from arte_edge.errors import ArteError, InputError
from arte_edge.export.gguf.imatrix_file import Imatrix, base_name, read_imatrix
from arte_edge.export.gguf.overrides import resolve_overrides
from arte_edge.export.gguf.quant_call import QuantJob, run_job
from arte_edge.export.gguf.quant_report import PLAIN_TYPES, QuantReport, make_report
from arte_edge.export.gguf.quant_types import (
    NEEDS_IMATRIX,
    QuantType,
    find_type,
    tensor_type,
)
from arte_edge.export.gguf.tensor_table import TensorTable, read_table
from arte_edge.extras import need
from arte_edge.models.gguf_header import read_header
from arte_edge.threads import thread_count

__all__ = ["QuantReport", "quantize"]


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
        overrides: pattern -> tensor type, as in `overrides.resolve_overrides`; the first match decides.
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
    return make_report(quant, types, before, after, matrix, log, size_bytes, time.monotonic() - started)


def _read_source(source: Path) -> TensorTable:
    read_header(source)  # refuses adapters, vocabularies, pieces of a split model
    table = read_table(source)
    done = [tensor for tensor in table.tensors.values() if tensor.type not in PLAIN_TYPES]
    if done:
        raise InputError(
            f"{source}: is quantized already ({done[0].name} is {done[0].type})",
            "Quantize from a file of 16 or 32 bits: a second rounding adds to the first.",
        )
    return table


def _check_request(
    quant: QuantType, types: Mapping[str, str], model: TensorTable, matrix: Imatrix | None, path: Path | None
) -> None:
    """Refuse early what llama.cpp would refuse late, ignore silently, or die of."""
    if types and not quant.is_quantized:
        raise InputError(
            f"Overrides have no effect on {quant.name}", "Choose a quantized type, or drop them."
        )
    hint = "Collect one first (arte_edge.export.gguf.imatrix), or choose IQ4_XS, Q3_K_M or a larger type."
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


def _metadata(model: TensorTable, matrix: Imatrix | None, path: Path | None) -> dict[str, str | int]:
    """Return the keys that ``llama-quantize`` writes about the matrix, with names in place of paths.

    What the source says of an earlier matrix is no longer true (and may hold a path), so it is blanked.
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


def _read_written(partial: Path, before: TensorTable, out: Path) -> TensorTable:
    """Return the written file's tensors once they are those of the source; a full disk shows here at the latest."""
    try:
        after = read_table(partial)
        missing = [name for name, tensor in before.tensors.items() if _shape(after, name) != tensor.shape]
    except InputError as error:
        raise ArteError(
            f"{out}: was not written whole ({error.message})", "Look for a full disk, then try again."
        ) from error
    if missing or len(after.tensors) != len(before.tensors):
        raise ArteError(
            f"{out}: the tensors written are not the source's", "Please report this with the model."
        )
    return after


def _shape(table: TensorTable, name: str) -> tuple[int, ...] | None:
    return table.tensors[name].shape if name in table.tensors else None


def _glob_safe(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)

"""A 16-bit GGUF file to a quantized one: checked beforehand, written whole or not at all, read back.

llama.cpp does the arithmetic. What it would reject late, ignore silently or crash on is rejected here before it starts,
and no path of this machine gets into the metadata. The name of a quantization is not what a file holds: rows that 256
does not divide get another type (most of SmolLM2-135M and Qwen2.5-0.5B), and mixes vary with the model and the
importance matrix. So the report is read back from the file itself.

The call runs in a child process, this module with a job as JSON on its standard input: llama.cpp aborts the whole
process on a file that it does not expect, cannot be interrupted, and keeps its buffers.

Types of single tensors are given by patterns; the first that matches a tensor decides:
    token_embd                      a tensor's name or a dotted part of it
    blk.*.attn_v.weight             a glob over the whole name (``.weight`` may be omitted)
    /blk\\.[0-3]\\.ffn_(up|down)/   a regular expression between slashes, searched for
A pattern that matches nothing is an error: a misspelt override would otherwise be silently ignored.
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from arte_edge.cache import atomic_file
from arte_edge.errors import ArteError, InputError, nearest
from arte_edge.extras import need
from arte_edge.gguf.reader import (
    FULL_WIDTH,
    TENSOR_TYPES,
    GgufHeader,
    QuantType,
    TensorInfo,
    find_type,
    read_header,
    read_model_header,
)
from arte_edge.machine import thread_count

if TYPE_CHECKING:
    from arte_edge.gguf.imatrix import Imatrix

# Rows of one tensor kept in memory at once. llama.cpp's own default is 8 GiB; the speed is the same.
_BUFFER_BYTES = 256 * 1024**2
_STRING, _INT = 3, 0  # LLAMA_KV_OVERRIDE_TYPE_STR, _INT
_TEXT_BYTES = 127  # an overriding string lives in char[128]
_BLOCK_VALUES = {label: block for label, block, _ in TENSOR_TYPES.values()}
# llama.cpp warns: "blk.0.attn_q.weight  - ncols    576 not divisible by 256 (required for type    q4_K) -> falling …"
_FALLBACK = re.compile(r"(\S+) +- ncols +\d+ not divisible by +\d+ \(required for type +(\w+)\)")
# A tensor in one of these is useless without an importance matrix, and llama.cpp rejects it.
_NEEDS_IMATRIX = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})
# Types of intermediate results or of plain numbers: no weight is stored in them.
_NOT_FOR_WEIGHTS = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "NVFP4"})
_SMALL_MODEL = 1_800_000_000  # parameters; "1.5B" models have up to 1.78 billion


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
) -> QuantReport:
    """Write the 16-bit or 32-bit model `source` to `out` as `type` ("Q4_K_M"); `out` appears whole or not at all.

    Args:
        imatrix: that of the same model's checkpoint (`imatrix.collect`).
        overrides: pattern -> tensor type, see above; the first match decides.

    Raises:
        InputError: an unknown type or override, a source that is quantized already, or a type that
            needs an importance matrix without one.
        ArteError: llama.cpp cannot quantize it, a package is missing, or the disk is full.
    """
    quant = find_type(type)
    need("gguf", "Quantizing")
    before = _read_source(source)
    types = resolve_overrides(overrides, list(before.tensors.values()))
    matrix = None
    if imatrix is not None:
        from arte_edge.gguf.imatrix import read_imatrix

        matrix = read_imatrix(imatrix)
    _check_request(quant, types, matrix)
    started = time.monotonic()
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with atomic_file(out, partial):
        for left_over in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
            left_over.unlink(missing_ok=True)
        job = _Job(
            source=str(source.absolute()),
            out=str(partial.absolute()),
            number=quant.number,
            threads=thread_count(),
            imatrix=None if imatrix is None else str(imatrix.absolute()),
            tensor_types={name: _tensor_type(label)[1] for name, label in types.items()},
            metadata=_metadata(matrix, imatrix),
        )
        try:
            log = _run(job)
        except ArteError as error:
            if shutil.disk_usage(out.parent).free < 1_000_000:
                hint = "Free some space or choose another folder."
                raise ArteError(f"{out}: the disk is full", hint) from error
            raise
        after = _read_written(partial, before, out)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        size_bytes = partial.stat().st_size
    written = after.tensors.values()
    n_value = sum(tensor.n_value for tensor in written)
    return QuantReport(
        type=quant.name,
        size_bytes=size_bytes,
        bits_per_weight=8 * sum(tensor.size_bytes for tensor in written) / n_value,
        tensor_types=dict(Counter(tensor.type for tensor in written).most_common()),
        fallbacks=_fallbacks(quant, types, before, after, log),
        seconds=time.monotonic() - started,
        warnings=tuple(_warnings(quant, types, after, n_value)),
    )


def _read_source(source: Path) -> GgufHeader:
    header = read_model_header(source)  # rejects adapters, vocabularies, pieces of a split model
    for tensor in header.tensors.values():
        if tensor.type not in FULL_WIDTH:
            what = f"{source}: is quantized already ({tensor.name} is {tensor.type})"
            raise InputError(what, "Quantize from a file of 16 or 32 bits: a second rounding adds to the first.")
    return header


def _check_request(quant: QuantType, types: Mapping[str, str], matrix: Imatrix | None) -> None:
    """Reject early what llama.cpp would reject late, ignore silently, or crash on."""
    if types and not quant.is_quantized:
        raise InputError(f"Overrides have no effect on {quant.name}", "Choose a quantized type, or drop them.")
    hint = "Collect one first (arte_edge.gguf.imatrix), or choose IQ4_XS, Q3_K_M or a larger type."
    if matrix is None and quant.needs_imatrix:
        raise InputError(f"{quant.name} needs an importance matrix", hint)
    for name, label in types.items():
        if label in _NEEDS_IMATRIX and (matrix is None or name not in matrix.sums):
            raise InputError(f"{name} as {label} needs an importance matrix with that tensor", hint)


def _metadata(matrix: Imatrix | None, path: Path | None) -> dict[str, str | int]:
    """Return the keys that ``llama-quantize`` writes about the matrix, with its name in place of its path."""
    if matrix is None or path is None:
        return {}
    return {
        "quantize.imatrix.file": path.name,
        "quantize.imatrix.dataset": matrix.dataset,
        "quantize.imatrix.entries_count": len(matrix.sums),
        "quantize.imatrix.chunks_count": matrix.chunk_count,
    }


def _read_written(partial: Path, before: GgufHeader, out: Path) -> GgufHeader:
    """Return the header of the written file if its tensors are those of the source; this also detects a full disk."""
    try:
        after = read_header(partial)
    except InputError as error:
        hint = "Look for a full disk, then try again."
        raise ArteError(f"{out}: was not written whole ({error.message})", hint) from error
    if after.shapes != before.shapes:
        raise ArteError(f"{out}: the tensors written are not the source's", "Please report this with the model.")
    return after


def resolve_overrides(overrides: Mapping[str, str], tensors: Sequence[TensorInfo]) -> dict[str, str]:
    """Return tensor name -> tensor type ("Q6_K") for the tensors that a pattern matches.

    Only matrices can be given a type; llama.cpp keeps norms and biases as they are.

    Raises InputError: an unknown type, a broken expression, or a pattern that matches no matrix.
    """
    matrices = [tensor.name for tensor in tensors if len(tensor.shape) > 1]
    names = [name for name in matrices if name.endswith(".weight") and "_norm." not in name]
    types: dict[str, str] = {}
    for pattern, requested in overrides.items():
        label, _ = _tensor_type(requested)
        matched = [name for name in names if _matches(pattern, name)]
        if not matched:
            parts = {part for name in names for part in name.split(".")} - {"blk", "weight"}
            hint = nearest(pattern, parts)
            raise InputError(f"The override '{pattern}' matches no matrix of the model", hint)
        for name in matched:
            types.setdefault(name, label)
    return types


def _tensor_type(name: str) -> tuple[str, int]:
    """Return the name and ggml's number of the tensor type `name` ("q6_k", "F16"), in any case."""
    upper = name.strip().upper()
    weights = {row[0]: n for n, row in TENSOR_TYPES.items() if row[0] not in _NOT_FOR_WEIGHTS}
    if upper not in weights:
        raise InputError(f"'{name}' is not a tensor type for weights", nearest(upper, weights))
    return upper, weights[upper]


def _matches(pattern: str, name: str) -> bool:
    if len(pattern) > 2 and pattern.startswith("/") and pattern.endswith("/"):
        try:
            return re.search(pattern[1:-1], name) is not None
        except re.error as error:
            raise InputError(f"The override '{pattern}' is not a regular expression: {error}") from error
    short = name.removesuffix(".weight")
    return fnmatchcase(name, pattern) or fnmatchcase(short, pattern) or pattern in name.split(".")


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
    return changed and block > 32 and tensor.shape[-1] % block != 0 and _BLOCK_VALUES[tensor.type] < block


def _warnings(quant: QuantType, types: Mapping[str, str], after: GgufHeader, n_parameter: int) -> Iterator[str]:
    if (known := quality_warning(quant, n_parameter)) is not None:
        yield known
    for name, label in types.items():
        if _BLOCK_VALUES[label] <= 32 and after.tensors[name].type != label:
            yield f"llama.cpp left {name} as {after.tensors[name].type}; the override requests {label}."


def quality_warning(quant: QuantType, n_parameter: int) -> str | None:
    """Return the known drawback of a type for a model of that size, or None.

    Source: perplexity of imatrix quantizations on wikitext, ThomasBaruzier's GGUF repositories of
    Qwen2.5-0.5B and 1.5B, September 2024; docs/verify.md has our own figures beside them.
    """
    if quant.name == "Q4_0" and n_parameter <= _SMALL_MODEL:
        return (
            "Q4_0 costs a model this small 7 to 13 % of perplexity (published: Qwen2.5-0.5B +12.6 %, 1.5B +6.6 %), "
            "Q4_K_M 2 to 3 %. Take Q4_0 only for its faster prefill on ARM."
        )
    return None


@dataclass(frozen=True)
class _Job:
    """What to quantize to what. `tensor_types` holds ggml numbers by exact tensor name."""

    source: str
    out: str
    number: int
    threads: int
    imatrix: str | None = None
    tensor_types: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str | int] = field(default_factory=dict)


def _run(job: _Job) -> str:
    """Quantize in a child process; return llama.cpp's log. The error has its reason for rejecting or crashing."""
    command = [sys.executable, "-P", "-m", "arte_edge.gguf.quantize"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    job_json, name = json.dumps(asdict(job)).encode(), Path(job.source).name
    child = subprocess.run(command, input=job_json, capture_output=True, env=environment, check=False)
    if child.returncode == -9:
        raise ArteError(f"Quantizing {name} was killed by the system, most likely for lack of memory")
    try:
        answer: dict[str, Any] = json.loads(child.stdout)
    except ValueError:
        output = child.stderr.decode(errors="replace").strip().splitlines() or [f"exit {child.returncode}"]
        reason = next((line for line in output if "GGML_ASSERT" in line or "Error" in line), output[-1])
        raise ArteError(
            f"{name}: llama.cpp crashed while quantizing: {reason[:300]}",
            "Check the file's sha256; a model of a new family may need a newer llama-cpp-python.",
        ) from None
    log = str(answer["log"])
    if answer["status"] != 0:
        marks, lines = ("failed to quantize:", "error", "ERROR"), log.splitlines()
        found = (line for mark in marks for line in lines if mark in line)
        reason = next(found, f"status {answer['status']}")
        reason = reason.partition("failed to quantize: ")[2] or reason
        raise ArteError(f"{name}: llama.cpp cannot quantize it: {reason.strip()[:300]}")
    return log


def call_llama_cpp(job: _Job) -> dict[str, Any]:
    """Fill the C structures, make the call, and return its status and log."""
    import llama_cpp as lib

    lines: list[str] = []
    listen = lib.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    lib.llama_log_set(listen, ctypes.c_void_p())
    lib.llama_backend_init()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = job.number, job.threads
    params.max_buf_size = _BUFFER_BYTES
    # Arrays end with an empty element; every array and string must live until the call is over.
    if job.tensor_types:
        types = (lib.llama_model_tensor_override * (len(job.tensor_types) + 1))()
        for slot, (name, number) in zip(types, job.tensor_types.items(), strict=False):
            slot.pattern, slot.type = f"^{name.replace('.', '[.]')}$".encode(), number
        params.tt_overrides = types
    if job.metadata:
        pairs = (lib.llama_model_kv_override * (len(job.metadata) + 1))()
        for slot, (key, value) in zip(pairs, job.metadata.items(), strict=False):
            slot.key = key.encode()
            if isinstance(value, str):
                cut = value.encode()[:_TEXT_BYTES].decode(errors="ignore")  # between characters
                slot.tag, slot.value.val_str = _STRING, cut.encode()
            else:
                slot.tag, slot.value.val_i64 = _INT, value
        params.kv_overrides = pairs
    if job.imatrix is not None:
        from arte_edge.gguf.imatrix import read_imatrix

        weights = read_imatrix(Path(job.imatrix)).weights()
        entries = (lib.llama_model_imatrix_data * (len(weights) + 1))()
        for slot, (name, values) in zip(entries, weights.items(), strict=False):
            slot.name, slot.size = name.encode(), values.size
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    status = lib.llama_model_quantize(os.fsencode(job.source), os.fsencode(job.out), ctypes.byref(params))
    return {"status": int(status), "log": "".join(lines)}


if __name__ == "__main__":
    print(json.dumps(call_llama_cpp(_Job(**json.load(sys.stdin)))))

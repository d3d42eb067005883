"""Read the header of a GGUF file: metadata, tensor infos, alignment. Nothing else in the package parses one.

GGML's own reader builds a numpy view of every token, which takes 4 to 14 seconds for a large vocabulary, and trusts
every length in the file. This one takes about a tenth of a second, needs no package, and checks each length against
the size of the file, so a damaged file is an error here instead of a crash inside a runtime minutes later. Arrays are
decoded when they are used. A parsed header is cached under the file's inode, size and modification time, so a file
that was renamed or linked after it was written is not parsed again.

Layout (ggml/docs/gguf.md, versions 2 and 3, little-endian): magic, version, counts; key-value pairs; tensor infos
(name, shape, type, offset); padding; tensor data.

The tables of types are compared with GGML's package in the tests; that package is optional on a device. A quantization
is a mix: Q4_K_M is mostly Q4_K with some Q6_K, and a tensor whose rows a type's blocks do not divide gets another type.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import InputError, nearest

# Types of metadata values
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
# value type -> struct code of one scalar
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Tensor types: ggml's number, name, values in a block, bytes of a block
_TENSOR_TYPES = """
0 F32 1 4, 1 F16 1 2, 30 BF16 1 2, 28 F64 1 8, 24 I8 1 1, 25 I16 1 2, 26 I32 1 4, 27 I64 1 8,
2 Q4_0 32 18, 3 Q4_1 32 20, 6 Q5_0 32 22, 7 Q5_1 32 24, 8 Q8_0 32 34, 9 Q8_1 32 40, 41 Q1_0 128 18, 42 Q2_0 64 18,
10 Q2_K 256 84, 11 Q3_K 256 110, 12 Q4_K 256 144, 13 Q5_K 256 176, 14 Q6_K 256 210, 15 Q8_K 256 292,
16 IQ2_XXS 256 66, 17 IQ2_XS 256 74, 22 IQ2_S 256 82, 18 IQ3_XXS 256 98, 21 IQ3_S 256 110, 20 IQ4_NL 32 18,
23 IQ4_XS 256 136, 19 IQ1_S 256 50, 29 IQ1_M 256 56, 34 TQ1_0 256 54, 35 TQ2_0 256 66, 39 MXFP4 32 17, 40 NVFP4 64 36
"""
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    int(number): (name, int(block_values), int(block_bytes))
    for number, name, block_values, block_bytes in map(str.split, _TENSOR_TYPES.split(","))
}
# Types of unquantized weights: a GGUF of one of these is written directly from a checkpoint.
FULL_WIDTH = ("F32", "F16", "BF16")


class QuantType(NamedTuple):
    """One file type: its name, llama.cpp's number for it, and the tensor type that most tensors get."""

    name: str
    number: int
    default: str
    needs_imatrix: bool

    @property
    def is_quantized(self) -> bool:
        return self.default not in FULL_WIDTH


# File types of llama.cpp (llama_ftype, llama-quantize): name, number, default tensor type. A ! marks those that need an
# importance matrix: some tensor of the mix is useless without one, or llama.cpp itself requires one (Q2_K_S).
_QUANT_TYPES = """
F32 0 F32, F16 1 F16, BF16 32 BF16, Q8_0 7 Q8_0, Q6_K 18 Q6_K, Q5_K_M 17 Q5_K, Q5_K_S 16 Q5_K, Q5_1 9 Q5_1, Q5_0 8 Q5_0,
Q4_K_M 15 Q4_K, Q4_K_S 14 Q4_K, Q4_1 3 Q4_1, Q4_0 2 Q4_0, IQ4_NL 25 IQ4_NL, IQ4_XS 30 IQ4_XS, MXFP4_MOE 38 MXFP4,
Q3_K_L 13 Q3_K, Q3_K_M 12 Q3_K, Q3_K_S 11 Q3_K, IQ3_M 27 IQ3_S, IQ3_S 26 IQ3_S, IQ3_XS 22 IQ3_S !, IQ3_XXS 23 IQ3_XXS !,
Q2_K 10 Q2_K, Q2_K_S 21 Q2_K !, IQ2_M 29 IQ2_S !, IQ2_S 28 IQ2_XS !, IQ2_XS 20 IQ2_XS !, IQ2_XXS 19 IQ2_XXS !,
Q2_0 41 Q2_0, TQ2_0 37 TQ2_0, TQ1_0 36 TQ1_0, IQ1_M 31 IQ1_M !, IQ1_S 24 IQ1_S !, Q1_0 40 Q1_0
"""
QUANT_TYPES = {
    name: QuantType(name, int(number), default, bool(mark))
    for name, number, default, *mark in map(str.split, _QUANT_TYPES.split(","))
}
# general.file_type -> the usual name of the mix
FILE_TYPES = {quant.number: quant.name for quant in QUANT_TYPES.values()} | {39: "NVFP4"}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as in llama-quantize

_MAX_DEPTH = 4  # of nested arrays; the format allows any depth, no known file uses more than one
_UNKNOWN = "unknown type "
_SHORT_ARRAY = 256  # longer arrays are vocabularies: `metadata` has their length only
_NOT_A_MODEL = {
    "adapter": "a LoRA adapter",
    "mmproj": "the image part of a larger model",
    "imatrix": "an importance matrix",
    "vocab": "a vocabulary",
}
_CACHE_SIZE = 4  # headers; each holds a few megabytes where the vocabulary is large
_MTIME_STEP_S = 0.01  # the coarsest clock tick of a Linux file system


def find_type(name: str) -> QuantType:
    """Return the quantization called `name`, in any case.

    Raises InputError: llama.cpp offers none of that name; names the nearest.
    """
    upper = name.strip().upper()
    found = QUANT_TYPES.get(_ALIASES.get(upper, upper))
    if found is None:
        hint = nearest(upper, [*QUANT_TYPES, *_ALIASES])
        raise InputError(f"'{name}' is not a quantization of llama.cpp", hint)
    return found


@dataclass(frozen=True)
class Field:
    """One metadata value: a scalar, `bytes` for a string (a token need not be UTF-8), or a list of either.

    `kind` and `item_kind` are GGUF value types; `item_kind` is set for arrays only.
    """

    kind: int
    value: Any
    item_kind: int | None = None


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in row-major order (``[n_out, n_in]``), `type` by name ("Q4_K"), its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset_bytes: int  # from the start of the file
    size_bytes: int

    @property
    def n_value(self) -> int:
        return math.prod(self.shape)


class _Pair(NamedTuple):
    """Where a key-value pair lies in the header: its key, its type (4 bytes), its value."""

    start: int
    kind_at: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of one file; `tensors` are in the file's order."""

    path: Path
    version: int
    alignment: int
    tensors: dict[str, TensorInfo]
    raw: bytes = field(repr=False)  # the whole header with its padding
    raw_tensor_infos: bytes = field(repr=False)
    _pairs: dict[str, _Pair] = field(repr=False)

    @property
    def data_offset_bytes(self) -> int:
        """Where the tensor data begins."""
        return len(self.raw)

    def field(self, key: str) -> Field | None:
        """Return the value of `key` with its exact type, None if there is no such key."""
        return _decoded(self.raw, self._pairs[key].kind_at) if key in self._pairs else None

    @cached_property
    def fields(self) -> dict[str, Field]:
        """All metadata with exact types, vocabulary included, so that it can be written again."""
        return {key: _decoded(self.raw, pair.kind_at) for key, pair in self._pairs.items()}

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """All metadata as plain values: strings as `str`; of an array with more than 256 items its length."""
        return {key: _plain(self.raw, pair.kind_at) for key, pair in self._pairs.items()}

    @property
    def raw_pairs(self) -> dict[str, bytes]:
        """The bytes of each key-value pair as they are in the file."""
        return {key: self.raw[pair.start : pair.end] for key, pair in self._pairs.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def quantization(self) -> str:
        """The name of the quantization, from ``general.file_type``, else the type of most bytes."""
        number = self.metadata.get("general.file_type")
        if isinstance(number, int) and number in FILE_TYPES:
            return FILE_TYPES[number]
        size_by_type: Counter[str] = Counter()
        for tensor in self.tensors.values():
            size_by_type[tensor.type] += tensor.size_bytes
        return size_by_type.most_common(1)[0][0] if size_by_type else ""

    @property
    def parameter_count(self) -> int:
        return sum(tensor.n_value for tensor in self.tensors.values())

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's own chat template, or None."""
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def context_tokens(self) -> int:
        """Context length that the model was trained for, 0 if the file does not say."""
        found = self.metadata.get(f"{self.architecture}.context_length")
        return found if isinstance(found, int) else 0

    def number(self, key: str) -> int:
        """Return the integer ``<architecture>.<key>``. (InputError: it is missing, or differs from layer to layer.)"""
        full = f"{self.architecture}.{key}"
        found = self.field(full)
        if found is None or not isinstance(found.value, int):
            hint = "Use a model whose layers are all alike."
            raise InputError(f"{self.path}: {full} is not one integer", hint)
        return found.value

    def floats(self, name: str) -> NDArray[np.float32]:
        """Return the values of an F32 tensor, in its shape.

        Raises InputError: there is no such tensor, or it is of another type.
        """
        found = self.tensors.get(name)
        if found is None or found.type != "F32":
            actual = "missing" if found is None else found.type
            raise InputError(f"{self.path}: tensor {name} is {actual}, expected F32")
        values = np.fromfile(self.path, np.dtype("<f4"), found.n_value, offset=found.offset_bytes)
        return values.reshape(found.shape)


def read_header(path: Path, *, any_tensor_type: bool = False) -> GgufHeader:
    """Return the header of the GGUF file `path`: a model, an adapter, an importance matrix. No tensor is read.

    Args:
        any_tensor_type: accept tensor types that a newer GGML added; their size is then 0.

    Raises InputError: not a GGUF, a version or tensor type we do not know, or cut short.
    """
    try:
        header = _cached(path)
    except _CutShort:
        raise InputError(
            f"{path}: cut short, {path.stat().st_size} bytes are fewer than its header promises",
            "Fetch the file again.",
        ) from None
    except ValueError as error:
        raise _unusable(path, str(error)) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    for tensor in header.tensors.values():
        if tensor.type.startswith(_UNKNOWN) and not any_tensor_type:
            raise _unusable(path, f"tensor {tensor.name} has the {tensor.type}; a newer arte-edge may know it")
    return header


def read_model_header(path: Path) -> GgufHeader:
    """Return the header of `path` if it is a language model that a runtime can load.

    Raises:
        InputError: as `read_header`; or an adapter, a vocabulary, one piece of a split model, or a file
            without ``general.architecture``.
    """
    header = read_header(path)
    kind = str(header.metadata.get("general.type", "model"))
    if kind != "model":
        raise _unusable(path, f"it holds {_NOT_A_MODEL.get(kind, kind)}, not a model")
    if not header.tensors:
        raise _unusable(path, "it holds no tensors, only a vocabulary")
    if (pieces := header.metadata.get("split.count", 0)) not in (0, 1):
        raise _unusable(path, f"it is one of {pieces} pieces; join them with 'llama-gguf-split --merge'")
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise _unusable(path, "it does not name its architecture (general.architecture)")
    return header


def _unusable(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: not a usable GGUF: {reason}", "Fetch or convert the file again.")


class _CutShort(ValueError):
    """The file ends before what its header promises."""


_cache: dict[tuple[int, ...], GgufHeader] = {}


def _cached(path: Path) -> GgufHeader:
    """Return the cached header if the file is unchanged since it was parsed."""
    state = path.stat()
    age_s = time.time() - state.st_mtime
    if 0 <= age_s < _MTIME_STEP_S:  # a change within the same clock tick would not show
        time.sleep(_MTIME_STEP_S - age_s)
        state = path.stat()
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    header = _cache.pop(key, None) or _parsed(path)
    _cache[key] = header  # the most recently used is last
    while len(_cache) > _CACHE_SIZE:
        del _cache[next(iter(_cache))]
    return header if header.path == path else dataclasses.replace(header, path=path)


def _parsed(path: Path) -> GgufHeader:
    if path.stat().st_size == 0:
        raise ValueError("empty file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse(path, data)
        except (struct.error, OverflowError):
            raise _CutShort from None


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    if data[:4] != b"GGUF":
        raise ValueError(f"it begins with {data[:4]!r}, not b'GGUF'")
    (version,) = struct.unpack_from("<I", data, 4)
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        raise ValueError("big-endian" if swapped else f"version {version}, we read 2 and 3")
    n_tensor, n_pair = struct.unpack_from("<QQ", data, 8)
    at, pairs = 24, dict[str, _Pair]()
    for _ in range(n_pair):
        key, kind_at = _name(data, at)
        if key in pairs:
            raise ValueError(f"the key {key} occurs twice")
        (kind,) = struct.unpack_from("<I", data, kind_at)
        end = _end_of(data, kind_at + 4, kind, key)
        pairs[key] = _Pair(at, kind_at, end)
        at = end
    alignment = 32
    if "general.alignment" in pairs:
        kind, alignment = struct.unpack_from("<II", data, pairs["general.alignment"].kind_at)
        if kind != UINT32 or alignment == 0 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment} of type {kind}")
    tensors_at, infos = at, list[TensorInfo]()
    for _ in range(n_tensor):
        info, at = _tensor_info(data, at)
        infos.append(info)
    start = at + -at % alignment
    tensors = {info.name: dataclasses.replace(info, offset_bytes=start + info.offset_bytes) for info in infos}
    if len(tensors) != n_tensor:
        raise ValueError("two tensors have the same name")
    if n_tensor and max(info.offset_bytes + info.size_bytes for info in tensors.values()) > len(data):
        raise _CutShort
    return GgufHeader(path, version, alignment, tensors, data[:start], data[tensors_at:at], pairs)


def _tensor_info(data: mmap.mmap, at: int) -> tuple[TensorInfo, int]:
    """Return one tensor info with an offset from the start of the data, and where it ends."""
    name, at = _name(data, at)
    (n_dim,) = struct.unpack_from("<I", data, at)
    if not 1 <= n_dim <= 4:
        raise ValueError(f"tensor {name} has {n_dim} dimensions")
    *shape, kind, offset_bytes = struct.unpack_from(f"<{n_dim}QIQ", data, at + 4)
    label, block_values, block_bytes = TENSOR_TYPES.get(kind, (f"{_UNKNOWN}{kind}", 1, 0))
    size_bytes = math.prod(shape) // block_values * block_bytes
    return TensorInfo(name, tuple(reversed(shape)), label, offset_bytes, size_bytes), at + 16 + 8 * n_dim


def _name(data: mmap.mmap, at: int) -> tuple[str, int]:
    """Return a key or a tensor's name, and where it ends."""
    raw, end = _string(data, at)
    if end > len(data):
        raise _CutShort
    return raw.decode("utf-8", errors="surrogateescape"), end


def _string(data: mmap.mmap | bytes, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length], at + 8 + length


def _end_of(data: mmap.mmap, at: int, kind: int, key: str, depth: int = 0) -> int:
    """Return where the value of type `kind` at `at` ends, which lies inside the file."""
    count = 1
    if kind == ARRAY:
        kind, count = struct.unpack_from("<IQ", data, at)
        at += 12
    if kind == STRING:
        length = struct.Struct("<Q").unpack_from
        for _ in range(count):  # a length beyond the file makes the next read fail
            at += 8 + length(data, at)[0]
    elif kind in SCALARS:
        at += struct.calcsize("<" + SCALARS[kind]) * count
    elif kind != ARRAY:
        raise ValueError(f"{key} has the unknown value type {kind}")
    elif depth == _MAX_DEPTH:
        raise ValueError(f"{key} has arrays nested more than {_MAX_DEPTH} deep")
    else:
        for _ in range(count):
            at = _end_of(data, at, ARRAY, key, depth + 1)
    if at > len(data):
        raise _CutShort
    return at


def _decoded(raw: bytes, kind_at: int) -> Field:
    """Return the value behind the type at `kind_at`."""
    (kind,) = struct.unpack_from("<I", raw, kind_at)
    if kind != ARRAY:
        return Field(kind, next(_values(raw, kind_at + 4, kind, 1)))
    item_kind, count = struct.unpack_from("<IQ", raw, kind_at + 4)
    return Field(kind, list(_values(raw, kind_at + 16, item_kind, count)), item_kind)


def _plain(raw: bytes, kind_at: int) -> Any:
    if raw[kind_at : kind_at + 4] == struct.pack("<I", ARRAY):
        item_kind, count = struct.unpack_from("<IQ", raw, kind_at + 4)
        if count > _SHORT_ARRAY or item_kind == ARRAY:
            return int(count)
        return [_as_text(item) for item in _decoded(raw, kind_at).value]
    return _as_text(_decoded(raw, kind_at).value)


def _as_text(value: Any) -> Any:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value


def _values(raw: bytes, at: int, kind: int, count: int) -> Iterator[Any]:
    """Yield `count` values of type `kind`."""
    if kind == STRING:
        for _ in range(count):
            value, at = _string(raw, at)
            yield value
    elif kind in SCALARS:
        yield from struct.unpack_from(f"<{count}{SCALARS[kind]}", raw, at)
    else:
        raise InputError("A GGUF file with arrays of arrays cannot be decoded", "Convert the model again.")

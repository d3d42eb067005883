"""An exported artifact, a GGUF file or an ONNX folder: its format, file name, predicted size and checksums.

GGUF types have llama.cpp's names in any case (``q4_k_m``; ``q4_k`` is ``Q4_K_M``). ONNX is ``int4``, ``int8`` or
``fp32`` for onnxruntime-genai, or has the prefix ``optimum-`` for the portable layout, whose int8 may name a
processor: ``optimum-int8-arm64``.

Two checksums identify an artifact: one of its bytes, one of its tensor data alone, which results are keyed on: new
metadata (a model card, a measured speed) keeps it. For GGUF it is the sha256 over the data of all tensors in file
order (``gguf-hash --sha256`` of llama.cpp), for ONNX over the external data files in name order, else over the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from arte_edge.cache import sha256_file
from arte_edge.errors import InputError, nearest
from arte_edge.gguf.reader import TENSOR_TYPES, find_type, read_header
from arte_edge.results.student_json import FileSum

Family = Literal["gguf", "onnx-genai", "onnx-optimum"]
Arch = Literal["arm64", "avx2", "avx512"]
ARCHS: tuple[str, ...] = get_args(Arch)
_REMOVED = ("Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8")
_GENAI = ("int4", "int8", "fp32")
_OPTIMUM = ("fp32", "int8")
_BITS = {label: 8 * size / block for label, block, size in TENSOR_TYPES.values()}
_BLOCKS = {label: block for label, block, _ in TENSOR_TYPES.values()}
# Types that llama.cpp uses if a row is not a multiple of 256 (llama-quant.cpp, tensor_type_fallback).
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_SMALL_BLOCKS = "IQ4_NL"
# The medium and large mixes give half of these matrices more bits.
_MORE = {"Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "Q4_K_M": "Q6_K", "Q5_K_M": "Q6_K"}
_MORE_PARTS = ("v_proj", "down_proj", "qkv_proj")
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
_HEAD_BYTES_PER_TOKEN = 38  # vocabulary and merges of a GGUF: 1.8 MB for SmolLM2's 49,152 tokens
_FOLDER_BYTES = 4_000_000  # tokenizer files of an ONNX folder


@dataclass(frozen=True)
class Format:
    """One format. `type` is a GGUF type in upper case, or an ONNX precision in lower case."""

    family: Family
    type: str
    arch: str = ""  # processor; optimum's int8 only

    @property
    def label(self) -> str:
        """The name in recipes and messages: ``Q4_K_M``, ``int4``, ``optimum-int8-avx2``."""
        if self.family != "onnx-optimum":
            return self.type
        return "-".join(filter(None, ("optimum", self.type, self.arch)))

    @property
    def is_folder(self) -> bool:
        """True for ONNX: a model with its tokenizer and settings."""
        return self.family != "gguf"

    def file_name(self, model: str) -> str:
        """Return the name of the file or folder of `model` in this format."""
        return f"{model}-onnx-{self.label}" if self.is_folder else f"{model}-{self.type}.gguf"


def gguf_format(text: str) -> Format:
    """Return the GGUF format named `text`, in any case; an `InputError` if llama.cpp has no such type."""
    if text.strip().upper() in _REMOVED:
        hint = "Use Q4_0, which is repacked when it is loaded."
        raise InputError(f"GGUF type {text}: llama.cpp removed it", hint)
    return Format("gguf", find_type(text).name)


def onnx_format(text: str, arch: Arch = "avx2") -> Format:
    """Return the ONNX format named `text`, or raise an `InputError`.

    `arch` is for an optimum int8 that names no processor.
    """
    name = text.strip().lower()
    if name in _GENAI:
        return Format("onnx-genai", name)
    builder, _, rest = name.partition("-")
    precision, _, named = rest.partition("-")
    if builder == "optimum" and precision in _OPTIMUM and (not named or named in ARCHS):
        if precision == "int8":
            return Format("onnx-optimum", precision, named or arch)
        if not named:
            return Format("onnx-optimum", precision)
    known = [*_GENAI, "optimum-fp32", "optimum-int8", *(f"optimum-int8-{arch}" for arch in ARCHS)]
    raise InputError(f"Unknown ONNX format '{text}'", nearest(name, known))


def format_of(label: str) -> Format:
    """Return the format with the label `label`, GGUF or ONNX. Raises InputError: no such format."""
    name = label.strip().lower()
    return onnx_format(name) if name in _GENAI or name.startswith("optimum") else gguf_format(label)


def parse_list(gguf: str | None, onnx: str | None, arch: str = "avx2") -> tuple[Format, ...]:
    """Return the formats in two comma-separated lists, in order, without repetitions.

    Raises InputError: a name is unknown, or a list is empty.
    """
    formats: list[Format] = []
    for flag, text in (("--gguf", gguf), ("--onnx", onnx)):
        if text is None:
            continue
        names = [name for name in text.split(",") if name.strip()]
        if not names:
            raise InputError(f"{flag}: the list is empty", f"For example {flag} {_EXAMPLE[flag]}")
        formats += [gguf_format(name) if flag == "--gguf" else onnx_format(name, cast(Arch, arch)) for name in names]
    return unique(formats)


_EXAMPLE = {"--gguf": "Q4_K_M,Q8_0", "--onnx": "int4"}


def unique(formats: Iterable[Format]) -> tuple[Format, ...]:
    """Return `formats` in order, without repetitions."""
    return tuple(dict.fromkeys(formats))


def predicted_bytes(format: Format, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the predicted size of the file or folder of `format`."""
    is_tied = not any(name.endswith("lm_head.weight") for name in shapes)
    bits = 0.0
    for name, shape in shapes.items():
        n_value = math.prod(shape)
        if format.family == "gguf":
            bits += n_value * _gguf_bits(format.type, name, shape, is_tied)
        else:
            bits += n_value * _onnx_bits(format, name, shape, is_tied)
            if is_tied and name.endswith("embed_tokens.weight") and _unties(format):
                bits += n_value * _onnx_bits(format, "lm_head.weight", shape, False)
    return round(bits / 8) + overhead_bytes(format, shapes)


def overhead_bytes(format: Format, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the bytes of a file or folder that are not weights."""
    n_vocab = max((shape[0] for name, shape in shapes.items() if name.endswith(_EMBEDDINGS)), default=0)
    return _FOLDER_BYTES if format.is_folder else _HEAD_BYTES_PER_TOKEN * n_vocab


def _gguf_bits(type: str, name: str, shape: tuple[int, ...], is_tied: bool) -> float:
    quant = find_type(type)
    if len(shape) < 2:
        return 32.0
    label = quant.default
    if quant.is_quantized and label != "Q8_0":
        if name.endswith("lm_head.weight") or (is_tied and name.endswith("embed_tokens.weight")):
            label = "Q6_K"
        elif type in _MORE and any(part in name for part in _MORE_PARTS):
            # Half of the layers; the average is enough for a sum of sizes.
            return (_type_bits(_MORE[type], shape) + _type_bits(label, shape)) / 2
    return _type_bits(label, shape)


def _type_bits(label: str, shape: tuple[int, ...]) -> float:
    """Return the bits per weight of a tensor type, or of its fallback if the blocks do not fit."""
    if shape[-1] % _BLOCKS.get(label, 1):
        label = _FALLBACK.get(label, _SMALL_BLOCKS)
    return _BITS.get(label, 16.0)


def _unties(format: Format) -> bool:
    """True if the builder stores a tied embedding a second time, as the output matrix."""
    return format.family == "onnx-optimum" or format.type == "int8"


def _onnx_bits(format: Format, name: str, shape: tuple[int, ...], is_tied: bool) -> float:
    if format.type == "fp32" or len(shape) < 2:
        return 32.0
    if format.family == "onnx-optimum":
        return 32.0 if name.endswith("down_proj.weight") else 8.0  # int8 would damage that product
    if name.endswith("embed_tokens.weight") and not (is_tied and format.type == "int4"):
        return 32.0  # only matrix products are quantized; int4 looks tokens up in the output matrix
    if format.type == "int4" and not name.endswith(_EMBEDDINGS):
        return 6.1  # measured: 28 % of the layers' weights get 8 bits
    return 9.0  # one float32 scale for 32 weights


_CHUNK_BYTES = 1 << 24
_ONNX_DATA = ("*.onnx.data", "*.onnx_data*")


@dataclass(frozen=True)
class Checksums:
    """The checksums and sizes of an artifact."""

    sha256: str
    tensor_sha256: str
    size_bytes: int
    tensor_bytes: int
    parts: tuple[FileSum, ...] = ()  # of a folder


def checksums_of(path: Path) -> Checksums:
    """Return the checksums of a GGUF file or an ONNX folder.

    Raises InputError: a GGUF that is cut short, or a folder without an ONNX model.
    """
    return _folder_checksums(path) if path.is_dir() else _gguf_checksums(path)


def _gguf_checksums(path: Path) -> Checksums:
    places = read_header(path).tensors.values()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for place in places:
            file.seek(place.offset_bytes)
            left = place.size_bytes
            while left > 0:
                data = file.read(min(left, _CHUNK_BYTES))
                digest.update(data)
                left -= len(data) or left
    tensor_bytes = sum(place.size_bytes for place in places)
    return Checksums(sha256_file(path), digest.hexdigest(), path.stat().st_size, tensor_bytes)


def _folder_checksums(path: Path) -> Checksums:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    parts = tuple(
        FileSum(file=file.relative_to(path).as_posix(), size_bytes=file.stat().st_size, sha256=sha256_file(file))
        for file in files
    )
    data = sorted({file for pattern in _ONNX_DATA for file in path.rglob(pattern)})
    data = data or sorted(path.rglob("*.onnx"))
    if not data:
        raise InputError(f"{path}: holds no .onnx model", "Export it again.")
    lines = "".join(f"{part.sha256}  {part.file}\n" for part in parts)
    tensors = hashlib.sha256()
    for file in data:
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                tensors.update(chunk)
    return Checksums(
        hashlib.sha256(lines.encode()).hexdigest(),
        tensors.hexdigest(),
        sum(part.size_bytes for part in parts),
        sum(file.stat().st_size for file in data),
        parts,
    )

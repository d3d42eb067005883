"""Read the head of a GGUF file and refuse one that no runtime could load.

A damaged file otherwise ends in a crash inside the runtime, minutes later and
without a reason. GGML's own reader needs seconds for a large vocabulary and trusts
every length it reads; this one takes a tenth of a second, needs no package, and
checks each length against the size of the file.

Layout (ggml/docs/gguf.md): magic, version, counts; key-value pairs; one record a
tensor (name, shape, type, offset); padding; tensor data.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arte_edge.errors import InputError
from arte_edge.models.gguf_cursor import ARRAY, SCALARS, STRING, CutShort, GgufCursor
from arte_edge.models.gguf_types import FILE_TYPES, TENSOR_TYPES

__all__ = ["GgufHeader", "read_header"]

_VERSIONS = (2, 3)
_NOT_A_MODEL = {
    "adapter": "a LoRA adapter",
    "mmproj": "the image part of a larger model",
    "imatrix": "an importance matrix",
    "vocab": "a vocabulary",
}


@dataclass(frozen=True)
class GgufHeader:
    """What the head of a file says. `metadata` has every pair; of an array only its length is kept."""

    path: Path
    architecture: str
    quantization: str
    tensor_count: int
    parameter_count: int
    data_offset_bytes: int
    metadata: dict[str, Any] = field(repr=False)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's own chat template, or None."""
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def context_tokens(self) -> int:
        """Context length that the model was trained for, 0 if not told."""
        return int(self.metadata.get(f"{self.architecture}.context_length", 0))


class _Cursor(GgufCursor):
    """Keeps every value but the items of arrays."""

    def value(self, kind: int, where: str) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._array(where)
        if kind not in SCALARS:
            raise ValueError(f"{where} has the unknown value type {kind}")
        return self.scalar(SCALARS[kind])

    def _array(self, where: str) -> int:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in SCALARS:
            self.skip(count * struct.calcsize("<" + SCALARS[kind]))
        elif kind == STRING:
            for _ in range(count):
                self.skip(self.scalar("Q"))
        else:
            raise ValueError(f"{where} is an array of the unknown value type {kind}")
        return int(count)


def read_header(path: Path) -> GgufHeader:
    """Read and check the head of `path`; the tensors themselves are not read.

    Raises:
        InputError: not a GGUF, a version or type we do not know, cut short, or no text model.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(data))
    except CutShort:
        raise InputError(
            f"{path}: cut short, {path.stat().st_size} bytes are fewer than its head promises",
            "Fetch the file again.",
        ) from None
    except ValueError as error:  # an empty file cannot be mapped, the others are ours
        reason = "empty file" if path.stat().st_size == 0 else str(error)
        raise InputError(
            f"{path}: not a usable GGUF: {reason}", "Fetch or convert the file again."
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    magic = cursor.data[:4]
    if magic != b"GGUF":
        raise ValueError(f"it begins with {magic!r}, not b'GGUF'")
    cursor.skip(4)
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        raise ValueError("big-endian" if swapped else f"version {version}, we read 2 and 3")
    tensor_count, pair_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.scalar("I"), key)
    _refuse_what_is_no_model(metadata, tensor_count)
    bytes_by_type: dict[str, int] = {}
    end_bytes = parameter_count = 0
    for _ in range(tensor_count):
        name = cursor.text()
        dimensions = cursor.scalar("I")
        if dimensions > 4:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = [cursor.scalar("Q") for _ in range(dimensions)]
        kind, offset_bytes = cursor.scalar("I"), cursor.scalar("Q")
        if kind not in TENSOR_TYPES:
            raise ValueError(f"tensor {name} has the unknown type {kind}; a newer arte-edge may know it")
        label, block_values, block_bytes = TENSOR_TYPES[kind]
        count = math.prod(shape)
        parameter_count += count
        size_bytes = count // block_values * block_bytes
        bytes_by_type[label] = bytes_by_type.get(label, 0) + size_bytes
        end_bytes = max(end_bytes, offset_bytes + size_bytes)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"general.alignment is {alignment}")
    data_offset_bytes = -(-cursor.at // alignment) * alignment
    if data_offset_bytes + end_bytes > len(cursor.data):
        raise CutShort
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ValueError("it does not say its architecture (general.architecture)")
    quantization = FILE_TYPES.get(metadata.get("general.file_type", -1))
    quantization = quantization or max(bytes_by_type, key=lambda label: bytes_by_type[label])
    return GgufHeader(
        path, architecture, quantization, tensor_count, parameter_count, data_offset_bytes, metadata
    )


def _refuse_what_is_no_model(metadata: dict[str, Any], tensor_count: int) -> None:
    kind = str(metadata.get("general.type", "model"))
    if kind != "model":
        raise ValueError(f"it holds {_NOT_A_MODEL.get(kind, kind)}, not a model")
    if tensor_count == 0:
        raise ValueError("it holds no tensors, only a vocabulary")
    if (pieces := metadata.get("split.count", 0)) not in (0, 1):
        raise ValueError(f"it is one of {pieces} pieces; join them with 'llama-gguf-split --merge'")

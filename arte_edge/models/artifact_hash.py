"""The hashes that identify an exported file: one of its bytes, one of its tensor data alone.

Rewriting a file's metadata (the text of a model card, a measured speed) changes the first and keeps
the second, which results are keyed on. For GGUF the second is the sha256 over the data of all
tensors in file order, without padding: what ``gguf-hash --sha256`` of llama.cpp prints for the whole
model. For ONNX it is the sha256 over the external data files in name order, or over the model itself
where it has none.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from arte_edge.cache import sha256_file
from arte_edge.errors import InputError
from arte_edge.gguf.reader import read_header
from arte_edge.results.student_json import FileSum

__all__ = ["Checksums", "checksums_of"]

_CHUNK_BYTES = 1 << 24
_ONNX_DATA = ("*.onnx.data", "*.onnx_data*")


@dataclass(frozen=True)
class Checksums:
    """What identifies an artifact, and how large it is."""

    sha256: str
    tensor_sha256: str
    size_bytes: int
    tensor_bytes: int
    parts: tuple[FileSum, ...] = ()  # of a folder


def checksums_of(path: Path) -> Checksums:
    """Return the checksums of a GGUF file or an ONNX folder.

    Raises:
        InputError: a GGUF that is cut short, or a folder without an ONNX model.
    """
    return _folder(path) if path.is_dir() else _gguf(path)


def _gguf(path: Path) -> Checksums:
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


def _folder(path: Path) -> Checksums:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    parts = tuple(
        FileSum(
            file=file.relative_to(path).as_posix(), size_bytes=file.stat().st_size, sha256=sha256_file(file)
        )
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

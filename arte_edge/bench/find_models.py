"""From what a user names to the files that are measured, and what each of them is.

A run's folder stands for its export, an export for all its files that passed the gate, a name of the
registry or a Hub id for the file that it leads to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arte_edge.errors import InputError
from arte_edge.runtimes.loader import decoder_format
from arte_edge.runtimes.null import null_ms

__all__ = ["Target", "describe", "find_targets"]

Format = Literal["gguf", "onnx-genai", "onnx", "safetensors", "null"]


@dataclass(frozen=True)
class Target:
    """One model to measure, and its part of a row."""

    path: Path
    format: Format
    model_filename: str
    model_type: str = ""
    model_size: int = 0
    model_n_params: int = 0
    quantization: str = ""
    sha256: str = ""
    tensor_sha256: str = ""


def find_targets(refs: Sequence[str], fetch: Callable[[str], Path]) -> list[Path]:
    """Return the files and folders that `refs` name, in order, each once.

    Args:
        fetch: finds what is not a path: a registry name, a Hub id.

    Raises:
        InputError: nothing of this name, or an export without a file that passed.
    """
    found: dict[Path, None] = {}
    for ref in refs:
        path = Path(ref).expanduser()
        if null_ms(Path(ref)) is not None and not path.exists():
            found[Path(ref)] = None
        elif path.is_dir():
            found |= dict.fromkeys(_in_folder(path))
        else:
            found[path if path.is_file() else fetch(ref)] = None
    return list(found)


def _in_folder(folder: Path) -> list[Path]:
    from arte_edge.results.student_json import FILE_NAME, read_student

    for place in (folder, folder / "export"):
        if (place / FILE_NAME).is_file() and (student := read_student(place)) is not None:
            files = [place / artifact.file for artifact in student.artifacts if artifact.status == "ok"]
            if not files:
                raise InputError(
                    f"{place}: no file here passed the gate", "See student.json for the reasons."
                )
            if missing := [file.name for file in files if not file.exists()]:
                raise InputError(f"{place}: {missing[0]} is missing", "Export it again.")
            return files
    try:
        decoder_format(folder)
        return [folder]
    except InputError:
        ggufs = sorted(folder.glob("*.gguf"))
        if ggufs:
            return ggufs
        if (folder / "run.toml").is_file():
            raise InputError(f"{folder}: nothing is exported yet", f"arte-edge export {folder}") from None
        raise


def describe(path: Path) -> Target:
    """Return what `path` is: format, sizes, sums.

    Raises:
        InputError: not a model, or damaged.
    """
    kind = decoder_format(path)
    if kind == "null":
        return Target(path, "null", path.name)
    from arte_edge.device.model_size import ModelShape

    shape = ModelShape.of(path)
    size = _size(path)
    sha256, tensors, label = _sums(path, kind)
    return Target(
        path=path,
        format=kind,  # type: ignore[arg-type]
        model_filename=path.resolve().name if path.name in ("", ".", "..") else path.name,
        model_type=shape.architecture,
        model_size=size,
        model_n_params=shape.n_params,
        quantization=label or shape.quantization,
        sha256=sha256,
        tensor_sha256=tensors,
    )


def _sums(path: Path, kind: str) -> tuple[str, str, str]:
    """Return the sha256, the sha256 of the tensors and the quantization, empty where unknown."""
    if kind == "safetensors":
        from arte_edge.cache import sha256_checkpoint

        return sha256_checkpoint(path), "", ""
    from arte_edge.results.student_json import read_student

    try:
        student = read_student(path.resolve().parent)
    except InputError:  # damaged: that must not keep anyone from measuring
        student = None
    artifacts = student.artifacts if student else ()
    own = next((a for a in artifacts if a.file.rstrip("/") == path.resolve().name), None)
    sha256 = _checksum(path)
    if own is None:
        from arte_edge.runtimes.onnxruntime import onnx_precision

        return sha256, _tensors(path), onnx_precision(path) if path.is_dir() else ""
    return sha256, own.tensor_sha256 if own.sha256 == sha256 else _tensors(path), own.quantization


def _checksum(path: Path) -> str:
    """Return the sha256 of a file, or of a folder as `arte_edge.models.artifact` makes it; a file's is cached."""
    from arte_edge.cache import sha256_file

    if path.is_file():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{sha256_file(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _tensors(path: Path) -> str:
    from arte_edge.models.artifact import checksums_of

    return checksums_of(path).tensor_sha256


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())

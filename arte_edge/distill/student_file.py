"""The student as the runs use it: a 16-bit file, before and after tuning, made by one path.

Base and tuned student must differ in their weights alone, not in quantization, so a
student that came as a quantized GGUF is scored and tested from the F16 file of its
checkpoint. F16 is also what decodes fastest when many sequences share a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from arte_edge.cache import room, sha256_file
from arte_edge.errors import ArteError, InputError
from arte_edge.models.local import LocalModel

__all__ = ["base_file", "quantized_file", "tuned_file"]


def base_file(model: LocalModel) -> LocalModel:
    """Return the F16 file of a GGUF student (made once, kept in the cache), or the checkpoint as it is."""
    if model.gguf is None or model.quantization == "F16":
        return model
    path = room("checkpoints") / f"{model.sha256[:16]}-F16.gguf"
    return _file(model.checkpoint(), model, path, model.name)


def quantized_file(
    model: LocalModel, kind: str, quantize: Callable[[Path, Path, str], object] | None
) -> LocalModel:
    """Return the base student as the device will run it: its F16 file quantized to `kind`, kept in the cache.

    `quantize` (16-bit file, file to write, type) is the exporter's, which this room does not know.

    Raises:
        InputError: the student is a checkpoint, which has no GGUF file; or an unknown type.
    """
    base = base_file(model)
    if base.gguf is None:
        raise InputError(
            f"prefer.student_file = '{kind}': {model.name} is a checkpoint and runs without a GGUF file",
            "Leave it empty, or give the student as a .gguf file.",
        )
    if kind == base.quantization:
        return base
    path = room("checkpoints") / f"{model.sha256[:16]}-{kind}.gguf"
    if not path.is_file():
        if quantize is None:
            raise ArteError("prefer.student_file: this run was started without a quantizer")
        quantize(base.gguf, path, kind)
    return LocalModel(f"{model.name} {kind}", sha256_file(path), path, None, kind)


def tuned_file(model: LocalModel, checkpoint: Path, out: Path) -> LocalModel:
    """Return the tuned student in the form that `base_file` has: an F16 file `out`, or the checkpoint."""
    if model.gguf is None:
        from arte_edge.models.resolve import from_folder

        return from_folder(checkpoint, f"{model.name} tuned")
    return _file(checkpoint, model, out, f"{model.name} tuned")


def _file(checkpoint: Path, model: LocalModel, path: Path, name: str) -> LocalModel:
    if not path.is_file():
        from arte_edge.gguf.from_base import checkpoint_to_gguf

        assert model.gguf is not None  # both callers looked
        checkpoint_to_gguf(checkpoint, model.gguf, path)
    return LocalModel(name, sha256_file(path), path, None, "F16")

"""The GGUF file from which a student runs: base, quantized or tuned.

Base and tuned student must differ in their weights alone, not in quantization. So a student that
came as a quantized GGUF is scored and tested from the F16 file of its checkpoint; F16 is also what
decodes fastest when many sequences share a batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from arte_edge.cache import cache_subdir, locked, sha256_file
from arte_edge.errors import InputError
from arte_edge.models.resolve import LocalModel, from_folder, from_gguf, resolve


def f16_student(model: LocalModel) -> LocalModel:
    """Return the F16 file of a GGUF student (made once and cached), or the checkpoint as it is."""
    if model.gguf is None or model.quantization == "F16":
        return model
    path = cache_subdir("checkpoints") / f"{model.sha256[:16]}-F16.gguf"
    checkpoint = model.checkpoint()
    with locked("student-file", of=path):  # other runs may make it at the same time
        return replace(_f16_file(checkpoint, model, path, model.name), ref=model.ref, made="F16")


def quantized_student(model: LocalModel, kind: str) -> LocalModel:
    """Return the base student as the device will run it: its F16 file quantized to `kind`, cached.

    Raises InputError: the student is a checkpoint, which has no GGUF file; or an unknown type.
    """
    base = f16_student(model)
    if base.gguf is None:
        raise InputError(
            f"prefer.student_file = '{kind}': {model.name} is a checkpoint, not a GGUF file",
            "Leave it empty, or give the student as a .gguf file.",
        )
    if kind == base.quantization:
        return base
    path = cache_subdir("checkpoints") / f"{model.sha256[:16]}-{kind}.gguf"
    with locked("student-file", of=path):
        if not path.is_file():
            from arte_edge.gguf.quantize import quantize

            quantize(base.gguf, path, kind)
    sha256 = sha256_file(path)
    return LocalModel(f"{model.name} {kind}", sha256, path, None, kind, ref=model.ref, made=kind)


def tuned_student(model: LocalModel, checkpoint: Path, out: Path) -> LocalModel:
    """Return the tuned student in the form that `f16_student` has: an F16 file `out`, or the checkpoint."""
    if model.gguf is None:
        return from_folder(checkpoint, f"{model.name} tuned")
    report = checkpoint / "training.json"
    if out.is_file() and report.is_file() and out.stat().st_mtime_ns < report.stat().st_mtime_ns:
        out.unlink()  # of an earlier training
    return _f16_file(checkpoint, model, out, f"{model.name} tuned")


def _f16_file(checkpoint: Path, model: LocalModel, path: Path, name: str) -> LocalModel:
    if not path.is_file():
        from arte_edge.gguf.from_base import checkpoint_to_gguf

        assert model.gguf is not None  # both callers looked
        checkpoint_to_gguf(checkpoint, model.gguf, path)
    return LocalModel(name, sha256_file(path), path, None, "F16", ref=str(path.absolute()))


def found_here(model: LocalModel) -> LocalModel:
    """Return on this machine a model that another one describes: at its path, else by its reference.

    Raises:
        InputError: this machine does not have it, or has another of its name.
        ArteError: it cannot be fetched or made.
    """
    if model.path.exists():
        found = from_gguf(model.path) if model.gguf else from_folder(model.path)
        if found.sha256 == model.sha256:
            return replace(model, gguf=found.gguf, folder=found.folder)
    base = resolve(model.ref)
    found = quantized_student(base, model.made) if model.made else base
    if found.sha256 != model.sha256:
        raise InputError(
            f"{found.path}: another model than {model.name} elsewhere: sha256 {found.sha256[:16]}…, "
            f"expected {model.sha256[:16]}…",
            "Remove it, or copy the right one there.",
        )
    return found

"""From a model reference to a verified model on this machine, and the file from which a student runs.

A reference is, in this order: a path (exists, ends in ``.gguf``, or begins with ``.``, ``/`` or ``~``), a Hub id
``org/name[@revision][:QUANT]``, or a name of the registry. A path needs neither the registry nor the Hub.

Base and tuned student must differ in their weights alone, not in quantization. So a student that came as a quantized
GGUF is scored and tested from the F16 file of its checkpoint (`f16_student`, `tuned_student`); F16 is also what decodes
fastest when many sequences share a batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from arte_edge.cache import Progress, cache_subdir, locked, sha256_checkpoint, sha256_file
from arte_edge.checkpoint import check_tied, read_config
from arte_edge.errors import InputError
from arte_edge.files import user_path
from arte_edge.gguf.reader import read_model_header
from arte_edge.model_folder import look

if TYPE_CHECKING:
    from arte_edge.models.registry import Entry


@dataclass(frozen=True)
class LocalModel:
    """A GGUF file or a checkpoint folder, verified, with the identity that runs are keyed on.

    Exactly one of `gguf` and `folder` is set. `sha256` is that of the GGUF file, or one checksum over a checkpoint's
    weights, configuration and tokenizer. `quantization` is "Q4_K_M" and the like for a GGUF, the weights' type
    ("BF16") for a checkpoint. Another machine finds it by `ref`; `made` is the type of a file that was made of that.
    """

    name: str
    sha256: str
    gguf: Path | None
    folder: Path | None
    quantization: str
    ref: str = field(default="", compare=False)
    made: str = field(default="", compare=False)

    @property
    def path(self) -> Path:
        """The GGUF file, or the checkpoint folder."""
        return self.gguf or cast(Path, self.folder)

    def checkpoint(self, progress: Progress | None = None) -> Path:
        """Return a safetensors folder with these weights; a GGUF is converted once and cached.

        Raises:
            ArteError: the packages for it are missing, or the disk is full.
            InputError: an architecture that transformers cannot read from GGUF.
        """
        if self.gguf is None:
            return cast(Path, self.folder)
        from arte_edge.gguf.to_hf import to_checkpoint

        return to_checkpoint(self.name, self.gguf, self.sha256, progress)


_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<quant>[\w.-]+))?")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def resolve(ref: str, *, offline: bool = False, progress: Progress | None = None) -> LocalModel:
    """Return the model that `ref` names, fetching and verifying it if it is not here yet.

    Args:
        ref: a registry name, a ``.gguf`` file, a checkpoint folder, or a Hub id.
        offline: use only what is on this machine (so do ``ARTE_EDGE_OFFLINE`` and ``HF_HUB_OFFLINE``).
        progress: called with (what, bytes done, bytes in all).

    Raises:
        InputError: unknown reference, unreadable or damaged model, or not here while offline.
        ArteError: it cannot be fetched, or the disk is full.
    """
    path = user_path(ref)
    if path.is_dir():
        return from_folder(path)
    if path.is_file():
        return from_gguf(path)
    if ref.endswith(".gguf") or ref.startswith((".", "/", "~")):
        raise InputError(f"{ref}: no such file or folder", "A model is a .gguf file or a checkpoint folder.")
    if match := _HUB_ID.fullmatch(ref):
        from arte_edge.models.hub import from_hub

        revision, quant = match["revision"] or "main", match["quant"] or ""
        found = from_hub(match["id"], revision, quant, offline=offline, progress=progress)
        return replace(from_folder(found, ref) if found.is_dir() else from_gguf(found, ref), ref=ref)
    from arte_edge.models import registry

    entry = registry.entry(ref)
    gguf = registry.pull(entry, offline=offline, progress=progress)
    quantization = read_model_header(gguf).quantization
    return LocalModel(entry.name, entry.sha256, gguf, None, quantization, ref=entry.name)


def from_gguf(path: Path, name: str = "") -> LocalModel:
    """Return the model in the GGUF file `path`. Raises InputError: not a GGUF, damaged, or no text model."""
    header = read_model_header(path)
    here = path.absolute()
    return LocalModel(name or path.stem, sha256_file(path), here, None, header.quantization, ref=str(here))


def from_folder(folder: Path, name: str = "") -> LocalModel:
    """Return the checkpoint in `folder`, or its only GGUF.

    Raises InputError: an adapter, or what `look` raises: two sets of weights, pickles, several GGUFs.
    """
    name = name or folder.resolve().name
    found = look(folder)
    if found.kind == "gguf":
        return from_gguf(found.weights[0], name)
    if found.kind == "adapter":
        raise InputError(f"{folder}: holds an adapter, not a model", "Merge it into its base model first.")
    check_tied(folder)
    config = read_config(folder)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
    here, quantization = folder.absolute(), _DTYPES.get(dtype, dtype)
    return LocalModel(name, sha256_checkpoint(folder), None, here, quantization, ref=str(here))


@dataclass(frozen=True)
class Finding:
    """The result of a check. `checkpoint` is set if the GGUF was converted before."""

    name: str
    state: Literal["ok", "missing", "damaged"]
    detail: str
    path: Path | None = None
    checkpoint: Path | None = None


def check(ref: str) -> Finding:
    """Verify the model that `ref` names, reading all of it; nothing is fetched or removed.

    Raises InputError: no such model.
    """
    from arte_edge.models import registry

    entries = registry.entries()
    if ref in entries and not Path(ref).exists():
        return _check_entry(entries[ref])
    model = resolve(ref, offline=True)
    if model.gguf is None:
        return Finding(model.name, "ok", f"checkpoint, {model.quantization}", model.folder, model.folder)
    checkpoint = _converted(model.name, model.sha256)
    return Finding(model.name, "ok", f"GGUF, {model.quantization}", model.gguf, checkpoint)


def _check_entry(entry: Entry) -> Finding:
    from arte_edge.models.registry import place

    path = place(entry)
    checkpoint = _converted(entry.name, entry.sha256)
    if not path.is_file():
        return Finding(entry.name, "missing", f"arte-edge models pull {entry.name}", None, checkpoint)
    if (size_bytes := path.stat().st_size) != entry.size_bytes:
        detail = f"{size_bytes} bytes, expected {entry.size_bytes}"
        return Finding(entry.name, "damaged", detail, path, checkpoint)
    if (sha256 := sha256_file(path, fresh=True)) != entry.sha256:
        detail = f"sha256 {sha256[:16]}…, expected {entry.sha256[:16]}…"
        return Finding(entry.name, "damaged", detail, path, checkpoint)
    try:
        header = read_model_header(path)
    except InputError as error:  # the file of a registry entry is not a model
        return Finding(entry.name, "damaged", error.message, path, checkpoint)
    detail = f"GGUF, {header.architecture}, {header.quantization}, {len(header.tensors)} tensors"
    return Finding(entry.name, "ok", detail, path, checkpoint)


def _converted(name: str, sha256: str) -> Path | None:
    from arte_edge.gguf.to_hf import checkpoint_folder

    folder = checkpoint_folder(name, sha256)
    return folder if folder.is_dir() else None


def f16_student(model: LocalModel) -> LocalModel:
    """Return the F16 file of a GGUF student (made once and cached), or the checkpoint as it is."""
    if model.gguf is None or model.quantization == "F16":
        return model
    path = cache_subdir("checkpoints") / f"{model.sha256[:16]}-F16.gguf"
    return replace(_f16_file(model.checkpoint(), model, path, model.name), ref=model.ref, made="F16")


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
    path, source = cache_subdir("checkpoints") / f"{model.sha256[:16]}-{kind}.gguf", base.gguf

    def make() -> None:
        from arte_edge.gguf.quantize import quantize

        quantize(source, path, kind)

    _make_once(path, make)
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
    def make() -> None:
        from arte_edge.gguf.from_base import checkpoint_to_gguf

        assert model.gguf is not None  # both callers looked
        checkpoint_to_gguf(checkpoint, model.gguf, path)

    _make_once(path, make)
    return LocalModel(name, sha256_file(path), path, None, "F16", ref=str(path.absolute()))


def _make_once(path: Path, make: Callable[[], None]) -> None:
    """Call `make` if the file `path` is missing, in one process: other runs may want it at the same time."""
    if not path.is_file():
        with locked("student-file", of=path):
            if not path.is_file():
                make()


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

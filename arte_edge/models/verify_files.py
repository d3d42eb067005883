"""Read a model that is already here and say whether it is what it should be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arte_edge.cache import sha256_file
from arte_edge.errors import InputError
from arte_edge.gguf.reader import read_model_header
from arte_edge.gguf.to_hf import checkpoint_folder
from arte_edge.models import registry
from arte_edge.models.hub import place
from arte_edge.models.resolve import resolve

__all__ = ["Finding", "check"]


@dataclass(frozen=True)
class Finding:
    """What a check found. `checkpoint` is set if the GGUF was converted before."""

    name: str
    state: Literal["ok", "missing", "damaged"]
    detail: str
    path: Path | None = None
    checkpoint: Path | None = None


def check(ref: str) -> Finding:
    """Read the whole of the model that `ref` names and compare; nothing is fetched or removed.

    Raises:
        InputError: no such model.
    """
    entries = registry.entries()
    if ref in entries and not Path(ref).exists():
        return _check_entry(entries[ref])
    model = resolve(ref, offline=True)
    if model.gguf is None:
        return Finding(model.name, "ok", f"checkpoint, {model.quantization}", model.folder, model.folder)
    checkpoint = _converted(model.name, model.sha256)
    return Finding(model.name, "ok", f"GGUF, {model.quantization}", model.gguf, checkpoint)


def _check_entry(entry: registry.Entry) -> Finding:
    path = place(entry)
    checkpoint = _converted(entry.name, entry.sha256)
    if not path.is_file():
        return Finding(entry.name, "missing", f"arte-edge models pull {entry.name}", None, checkpoint)
    found_bytes = path.stat().st_size
    if found_bytes != entry.size_bytes:
        detail = f"{found_bytes} bytes where the registry says {entry.size_bytes}"
        return Finding(entry.name, "damaged", detail, path, checkpoint)
    found = sha256_file(path, fresh=True)
    if found != entry.sha256:
        detail = f"sha256 {found[:16]}… where the registry says {entry.sha256[:16]}…"
        return Finding(entry.name, "damaged", detail, path, checkpoint)
    try:
        header = read_model_header(path)
    except InputError as error:  # the registry names a file that is no model
        return Finding(entry.name, "damaged", error.message, path, checkpoint)
    detail = f"GGUF, {header.architecture}, {header.quantization}, {len(header.tensors)} tensors"
    return Finding(entry.name, "ok", detail, path, checkpoint)


def _converted(name: str, sha256: str) -> Path | None:
    folder = checkpoint_folder(name, sha256)
    return folder if folder.is_dir() else None

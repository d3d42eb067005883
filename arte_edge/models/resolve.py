"""From what a user wrote to a model on this machine.

A reference is, in this order: a path (exists, ends in ``.gguf``, or begins with
``.``, ``/`` or ``~``), a Hub id ``org/name[@revision][:QUANT]``, or a name of the
registry. Everything is checked before a runtime sees it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from arte_edge.cache import Progress, sha256_checkpoint, sha256_file
from arte_edge.errors import InputError
from arte_edge.gguf.reader import read_model_header
from arte_edge.models import hub, registry
from arte_edge.models.local import LocalModel

__all__ = ["from_folder", "from_gguf", "resolve"]

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
    path = Path(ref).expanduser()
    if path.is_dir():
        return from_folder(path)
    if path.is_file():
        return from_gguf(path)
    if ref.endswith(".gguf") or ref.startswith((".", "/", "~")):
        raise InputError(f"{ref}: no such file or folder", "A model is a .gguf file or a checkpoint folder.")
    if match := _HUB_ID.fullmatch(ref):
        from arte_edge.models.hub import from_hub

        found = from_hub(
            match["id"], match["revision"] or "main", match["quant"] or "", offline=offline, progress=progress
        )
        return from_folder(found, ref) if found.is_dir() else from_gguf(found, ref)
    entry = registry.entry(ref)
    gguf = hub.pull(entry, offline=offline, progress=progress)
    return LocalModel(entry.name, entry.sha256, gguf, None, read_model_header(gguf).quantization)


def from_gguf(path: Path, name: str = "") -> LocalModel:
    """Return the model in the GGUF file `path`.

    Raises:
        InputError: not a GGUF, damaged, or no text model.
    """
    header = read_model_header(path)
    return LocalModel(name or path.stem, sha256_file(path), path.absolute(), None, header.quantization)


def from_folder(folder: Path, name: str = "") -> LocalModel:
    """Return the checkpoint in `folder`, or the one GGUF that lies there.

    Raises:
        InputError: neither, or something else: an adapter, pickled weights, several GGUFs.
    """
    name = name or folder.resolve().name
    if any(folder.glob("*.safetensors")) and (folder / "config.json").is_file():
        _check_shards(folder)
        return LocalModel(name, sha256_checkpoint(folder), None, folder.absolute(), _weights_type(folder))
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return from_gguf(ggufs[0], name)
    if ggufs:
        raise InputError(
            f"{folder}: holds {len(ggufs)} GGUF files", f"Name one of them, for example {ggufs[0]}."
        )
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: holds an adapter, not a model", "Merge it into its base model first.")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise InputError(
            f"{folder}: its weights are pickles, which can run code when opened",
            "Save the model as safetensors (save_pretrained does by default) and give that folder.",
        )
    raise InputError(f"{folder}: no model here", "A checkpoint has config.json and *.safetensors.")


def _check_shards(folder: Path) -> None:
    """Raise unless every file that a sharded checkpoint's index names is there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        files = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{index}: not a weights index", "Fetch the checkpoint again.") from error
    if missing := sorted(name for name in files if not (folder / name).is_file()):
        raise InputError(f"{folder}: {missing[0]} is missing", "Fetch the checkpoint again.")


def _weights_type(folder: Path) -> str:
    config = folder / "config.json"
    try:
        keys = json.loads(config.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{config}: not valid JSON", "Fetch the checkpoint again.") from error
    dtype = str(keys.get("dtype") or keys.get("torch_dtype") or "")
    return _DTYPES.get(dtype, dtype)

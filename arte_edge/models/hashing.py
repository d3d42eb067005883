"""The sha256 of files and checkpoints: what identifies a model everywhere in a run.

A gigabyte takes seconds to read, so sums of large files are remembered under the
file's path, size and modification time in nanoseconds; a file changed in any way
that shows there is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from arte_edge.models.home import home

__all__ = ["sha256_checkpoint", "sha256_file"]

_WORTH_REMEMBERING_BYTES = 4_000_000
# What decides the text a checkpoint writes: its weights, shape and tokens.
_IDENTITY = ("*.safetensors", "config.json", "tokenizer.json", "tokenizer.model")


def sha256_file(path: Path, *, fresh: bool = False) -> str:
    """Return the sha256 of `path` in hexadecimal, from memory if the file is unchanged.

    Args:
        fresh: read the file whatever is remembered; a disk can go bad without a change of time.
    """
    path = path.resolve()
    state = path.stat()
    known = _load()
    mark = [state.st_size, state.st_mtime_ns]
    if not fresh and (row := known.get(str(path))) and row[:2] == mark:
        return str(row[2])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if state.st_size >= _WORTH_REMEMBERING_BYTES:
        _remember(str(path), [*mark, digest])
    return digest


def sha256_checkpoint(folder: Path) -> str:
    """Return one sha256 over the names and sums of the files that decide what a checkpoint writes."""
    files = sorted({path for pattern in _IDENTITY for path in folder.glob(pattern)})
    lines = [f"{sha256_file(path)}  {path.name}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _load() -> dict[str, list[int | str]]:
    try:
        rows = json.loads((home() / "hashes.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(rows, dict):
        return {}
    return {path: row for path, row in rows.items() if isinstance(row, list) and len(row) == 3}


def _remember(path: str, row: list[int | str]) -> None:
    """Keep one sum. Losing it costs a second reading, so a cache that cannot be written is no error."""
    with contextlib.suppress(OSError):
        home().mkdir(parents=True, exist_ok=True)
        rows = {known: value for known, value in _load().items() if Path(known).exists()} | {path: row}
        handle, name = tempfile.mkstemp(dir=home(), prefix="hashes.", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
        Path(name).replace(home() / "hashes.json")

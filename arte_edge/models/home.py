"""Where models live on this machine, and whether the network may be used.

One folder holds everything that can be fetched or computed again: the user's
cache folder, or ``ARTE_EDGE_HOME``. Its rooms:

    models/       files of the registry, complete and verified
    hub/          files and checkpoints named by Hub id, one folder a commit
    checkpoints/  GGUF weights turned into safetensors
    staging/      downloads and conversions that are not finished
    hashes.json   sha256 of large files, so that they are read only once
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from arte_edge.models.disk import unwritable

__all__ = ["Progress", "home", "is_offline", "locked", "room", "slug", "user_registry"]

# What is going on, bytes done, bytes in all (0: not known).
Progress = Callable[[str, int, int], None]

_TRUE = {"1", "on", "yes", "true"}


def home() -> Path:
    """Return the cache folder: ``ARTE_EDGE_HOME`` if set, else the user's cache folder."""
    import platformdirs

    if chosen := os.environ.get("ARTE_EDGE_HOME"):
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_cache_path("arte-edge", appauthor=False)


def user_registry() -> Path:
    """Return where the user's own ``models.toml`` is looked for; it need not exist."""
    import platformdirs

    if os.environ.get("ARTE_EDGE_HOME"):
        return home() / "models.toml"
    return platformdirs.user_config_path("arte-edge", appauthor=False) / "models.toml"


def is_offline(asked: bool = False) -> bool:
    """True if the caller, ``ARTE_EDGE_OFFLINE`` or ``HF_HUB_OFFLINE`` forbids the network."""
    names = ("ARTE_EDGE_OFFLINE", "HF_HUB_OFFLINE")
    return asked or any(os.environ.get(name, "").lower() in _TRUE for name in names)


def room(*parts: str) -> Path:
    """Return a folder below `home`, created if need be.

    Raises:
        ArteError: the system does not allow it.
    """
    folder = home().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(error, folder) from error
    return folder


def slug(name: str) -> str:
    """Return `name` as one safe path part."""
    return re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip(".-") or "model"


@contextmanager
def locked(name: str, progress: Progress | None = None) -> Iterator[None]:
    """Hold a lock that all processes of this machine share, so that nothing is fetched twice.

    The lock belongs to the process: it is free again however the process ends.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(room("locks") / f"{slug(name)}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            progress("waiting for another process", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()

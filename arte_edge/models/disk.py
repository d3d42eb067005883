"""Writing large files so that a reader sees all of a file or none of it.

Everything is written below ``staging/`` and renamed into place once it is
complete, checked and on the disk. A full disk is an error of its own, since the
remedy differs from that of a bad network.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arte_edge.errors import ArteError

__all__ = [
    "FULL_MARKS",
    "DiskFull",
    "check_room",
    "full_disk_is_clear",
    "megabytes",
    "publish",
    "unwritable",
    "whole_file",
]

# No space, quota used up, file size limit reached: the same to a user.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# How the same errors read in the output of a child process.
FULL_MARKS = tuple(os.strerror(number) for number in sorted(_FULL))


class DiskFull(ArteError):
    """The disk holding the cache has no room left."""

    def __init__(self, where: Path, what: str) -> None:
        super().__init__(
            f"No room on the disk for {what} (below {where})",
            "Free some space, or set ARTE_EDGE_HOME to a folder on a larger disk. No half file is left.",
        )


def unwritable(error: OSError, folder: Path) -> ArteError:
    """Return the error for a system that refuses to read or write below `folder`."""
    where = error.filename or folder
    return ArteError(
        f"{where}: {error.strerror or error}",
        "Check the rights of that folder, or set ARTE_EDGE_HOME to one you may write to.",
    )


def megabytes(size_bytes: int) -> str:
    """Return `size_bytes` as a short text in decimal megabytes or gigabytes."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def check_room(folder: Path, need_bytes: int, what: str) -> None:
    """Raise `DiskFull` before anything is fetched if `need_bytes` cannot fit below `folder`."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        raise DiskFull(folder, f"{what}: {megabytes(need_bytes)} needed, {megabytes(free_bytes)} free")


@contextmanager
def full_disk_is_clear(staging: Path, what: str) -> Iterator[None]:
    """Turn "no space left" into `DiskFull` and remove `staging`, which would keep the disk full.

    Other refusals of the system, such as missing rights, become an `ArteError` that names the path.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise unwritable(error, staging) from error
        shutil.rmtree(staging, ignore_errors=True)
        raise DiskFull(staging.parent, what) from error
    except DiskFull:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def publish(staged: Path, final: Path) -> Path:
    """Put `staged`, a file or a folder on the same disk, in its final place, all at once and for good."""
    for path in [staged, *staged.rglob("*")] if staged.is_dir() else [staged]:
        _flush(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    staged.replace(final)
    _flush(final.parent)
    return final


def _flush(path: Path) -> None:
    """Write what the system still holds of `path` to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder; its rename is durable by itself
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(out: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield the path to write to, `partial` or one beside `out`; it becomes `out` when the block ends well.

    When it does not, nothing is left; what a killed process left the next one overwrites.

    Raises:
        ArteError: the disk is full or not writable.
    """
    partial = partial or out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(out)
    except OSError as error:
        raise ArteError(
            f"{out}: {error.strerror or error}", "Free some space or choose another folder."
        ) from error
    finally:
        partial.unlink(missing_ok=True)

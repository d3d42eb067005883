"""The cache folder of this machine: where it is, files that appear whole or not at all, and checksums.

One folder holds everything that can be fetched or computed again: the user's cache folder, or
``ARTE_EDGE_HOME``. Below it:

    models/       files of the registry, complete and verified
    hub/          files and checkpoints named by Hub id, one folder a commit
    checkpoints/  GGUF weights turned into safetensors
    staging/      downloads and conversions that are not finished
    hashes.json   sha256 of large files, so that each is read only once

A large file is written below ``staging/`` and renamed once it is complete, verified and flushed. A full
disk has its own error class, because its remedy differs from that of a failed download.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from arte_edge.errors import ArteError, InputError
from arte_edge.files import json_loads, user_path
from arte_edge.model_folder import TOKENIZER_FILES

# (step, bytes done, total bytes); a total of 0 means unknown
Progress = Callable[[str, int, int], None]

_TRUE = {"1", "on", "yes", "true"}


def cache_dir() -> Path:
    """Return the cache folder: ``ARTE_EDGE_HOME`` if set, else the user's cache folder."""
    import platformdirs

    if chosen := os.environ.get("ARTE_EDGE_HOME"):
        return user_path(chosen).absolute()
    return platformdirs.user_cache_path("arte-edge", appauthor=False)


def user_settings() -> Path:
    """Return the folder of the user's own ``models.toml`` and devices: ``ARTE_EDGE_HOME`` or that of settings."""
    import platformdirs

    if os.environ.get("ARTE_EDGE_HOME"):
        return cache_dir()
    return platformdirs.user_config_path("arte-edge", appauthor=False)


def user_registry() -> Path:
    """Return where the user's own ``models.toml`` is looked for; it need not exist."""
    return user_settings() / "models.toml"


def is_offline(requested: bool = False) -> bool:
    """True if the caller, ``ARTE_EDGE_OFFLINE`` or ``HF_HUB_OFFLINE`` disables network access."""
    names = ("ARTE_EDGE_OFFLINE", "HF_HUB_OFFLINE")
    return requested or any(os.environ.get(name, "").lower() in _TRUE for name in names)


def cache_subdir(*parts: str) -> Path:
    """Return a folder below `cache_dir`, created if it is missing. Raises ArteError: it cannot be created."""
    folder = cache_dir().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise access_error(error, folder) from error
    return folder


def slug(name: str) -> str:
    """Return `name` as one safe path part."""
    return re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip(".-") or "model"


@contextmanager
def locked(name: str, progress: Progress | None = None, *, of: Path | None = None) -> Iterator[None]:
    """Hold a lock shared by all processes of this machine, so that nothing is fetched twice.

    With `of`, each file or folder has a lock of its own. The operating system releases it when the process ends, also
    after a kill.
    """
    from filelock import FileLock, Timeout

    if of is not None:
        name = f"{name}-{hashlib.sha256(os.fsencode(of.resolve())).hexdigest()[:24]}"
    lock = FileLock(cache_subdir("locks") / f"{slug(name)}.lock")
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


# No space, quota exceeded, file size limit reached: the same problem for a user.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# The texts of these errors in the output of a child process.
DISK_FULL_MESSAGES = tuple(os.strerror(number) for number in sorted(_FULL))


def is_disk_full(error: OSError) -> bool:
    """True if there is no room left, for this user or on this disk."""
    return error.errno in _FULL


class DiskFull(ArteError):
    """The disk has no room left."""

    def __init__(self, where: Path, what: str) -> None:
        super().__init__(
            f"{where}: the disk is full; no room for {what}",
            "Free some space, or set ARTE_EDGE_HOME to a folder on a larger disk, and re-run the same command. "
            "Everything that was finished is still there, and no half file.",
        )


def access_error(error: OSError, folder: Path) -> ArteError:
    """Return the error to raise when the system denies reading or writing below `folder`."""
    where = error.filename or folder
    return ArteError(
        f"{where}: {error.strerror or error}",
        "Check the permissions of that folder, or set ARTE_EDGE_HOME to one that is writable.",
    )


def megabytes(size_bytes: float) -> str:
    """Return a size as a short text in decimal units: 1.25 GB, 105.5 MB; below 0.1 MB in kB or bytes."""
    if size_bytes >= 100_000:
        return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
    return f"{size_bytes / 1e3:.1f} kB" if size_bytes >= 1000 else f"{size_bytes:.0f} B"


def check_free_space(folder: Path, need_bytes: int, what: str) -> None:
    """Raise `DiskFull` before anything is fetched if `need_bytes` cannot fit below `folder`."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        raise DiskFull(folder, f"{what}: {megabytes(need_bytes)} needed, {megabytes(free_bytes)} free")


@contextmanager
def cleanup_on_full_disk(staging: Path, what: str) -> Iterator[None]:
    """Turn "no space left" into `DiskFull` and remove `staging`, which would keep the disk full.

    Other errors of the system, such as missing permissions, become an `ArteError` that names the path.
    """
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise access_error(error, staging) from error
        shutil.rmtree(staging, ignore_errors=True)
        raise DiskFull(staging.parent, what) from error
    except DiskFull:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def rename_into_place(staged: Path, final: Path) -> Path:
    """Flush `staged`, a file or a folder on the same disk, and rename it to `final` atomically."""
    for path in [staged, *staged.rglob("*")] if staged.is_dir() else [staged]:
        _flush(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    staged.replace(final)
    _flush(final.parent)
    return final


def _flush(path: Path) -> None:
    """Flush `path` to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder; its rename is durable by itself
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space" and "read-only" into errors with a hint; other errors of the system pass.

    Raises DiskFull: there is no space left; InputError: `path` may not be written.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(path, "this file") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error
        raise


@contextmanager
def atomic_file(out: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path, `partial` or one beside `out`, that is renamed to `out` when the block succeeds.

    When it fails, the temporary file is removed; one that a killed process left is overwritten.

    Raises ArteError: the disk is full or not writable.
    """
    partial = partial or out.with_name(f".{out.name}.partial")
    try:
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(out)
    except OSError as error:
        raise ArteError(f"{out}: {error.strerror or error}", "Free some space or choose another folder.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, also after a power cut.

    Raises ArteError: the disk is full or not writable; no half file stays.
    """
    own = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    with atomic_file(path, own) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


T = TypeVar("T")
Row = dict[str, Any]


def cached_measurement(
    kind: str,
    facts: Sequence[object],
    read: Callable[[Row], T | None],
    measure: Callable[[], Row],
    *,
    fresh: bool = False,
    store: bool = True,
) -> T:
    """Return what `read` finds in the stored row of `kind` for `facts`; without one, in what `measure` returns.

    The first result stays, because a run that resumes should repeat its batches bit for bit. A cache
    that cannot be written costs the next measurement and is no error.

    Args:
        kind: "layout" or the like; rows are files in the cache folder ``<kind>s/``.
        facts: everything that the result depends on.
        read: turns a row into the result; None: the row is of no use, measure again.
        fresh: measure again, whatever is stored.
        store: False: what is measured now is not stored.
    """
    name = hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()[:24]
    path = cache_dir() / f"{kind}s" / f"{name}.json"
    if not fresh and (known := _stored(path, read)) is not None:
        return known
    with locked(f"{kind}-{name}") if _is_writable(path.parent) else contextlib.nullcontext():
        if not fresh and (known := _stored(path, read)) is not None:  # another process was first
            return known
        row = measure()
        found = read(row)
        assert found is not None
        if store:
            with contextlib.suppress(ArteError):
                write_atomic(path, f"{json.dumps(row)}\n".encode())
        return found


def _stored(path: Path, read: Callable[[Row], T | None]) -> T | None:
    try:
        return read(json_loads(path.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_writable(folder: Path) -> bool:
    try:
        return cache_subdir(folder.name) == folder
    except ArteError:
        return False


_CACHED_FROM_BYTES = 4_000_000
# The files that determine a checkpoint's output: weights, shape, tokenizer and where an answer ends.
_IDENTITY = ("*.safetensors", "config.json", "generation_config.json", *TOKENIZER_FILES)


def sha256_file(path: Path, *, fresh: bool = False, since_boot: bool = False) -> str:
    """Return the sha256 of `path` in hexadecimal, from ``hashes.json`` if the file is the same as when it was read.

    The same is: size, both times and inode. Whoever writes to a file can set its mtime back, but not its ctime.

    Args:
        fresh: read the file in any case; a failing disk corrupts data without changing any time.
        since_boot: read it if this machine has not done so since it was started.
    """
    path = path.resolve()
    state = path.stat()
    mark: list[int | str] = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, boot_id()]
    row = None if fresh else _load().get(str(path))
    if row and row[:4] == mark[:4] and (row[4] == mark[4] or not since_boot):
        return str(row[5])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if state.st_size >= _CACHED_FROM_BYTES:
        _remember(str(path), [*mark, digest])
    return digest


def sha256_checkpoint(folder: Path) -> str:
    """Return one sha256 over the names and checksums of a checkpoint's weights, config and tokenizer."""
    files = sorted({path for pattern in _IDENTITY for path in folder.glob(pattern)})
    lines = [f"{sha256_file(path)}  {path.name}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def boot_id() -> str:
    """Return an id that changes when the machine is started, empty where the system has none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return ""


def _load() -> dict[str, list[int | str]]:
    try:
        rows = json_loads((cache_dir() / "hashes.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(rows, dict):
        return {}
    return {path: row for path, row in rows.items() if isinstance(row, list) and len(row) == 6}


def _remember(path: str, row: list[int | str]) -> None:
    """Store one checksum. Losing it costs a second read, so a cache that cannot be written is no error."""
    with contextlib.suppress(OSError, ArteError):
        rows = {known: value for known, value in _load().items() if Path(known).exists()} | {path: row}
        write_atomic(cache_dir() / "hashes.json", json.dumps(rows, indent=1).encode())

"""The build cache of an export: finished steps and the hash of their inputs, so that a rerun resumes.

    DIR/.export/
        lock            one process at a time
        records/        one JSON file a step: hash of its inputs, checksums of the file it built
        pending/        files that are built and not verified yet
        base/           the 16-bit GGUF that others are quantized from; removed at the end

A verified file gets its name in DIR by a rename. A step's record is written after its file is complete,
so a kill between the two repeats one step. A record is valid only while its file has the recorded checksums.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from arte_edge.cache import access_error, cleanup_on_full_disk, megabytes, write_atomic
from arte_edge.errors import ArteError, InputError
from arte_edge.models.artifact import Checksums, checksums_of
from arte_edge.store import content_key

__all__ = ["BuildCache", "BuiltFile", "remove"]

REJECTED = ".rejected"


@dataclass(frozen=True)
class BuiltFile:
    """A complete file or folder, its checksums, and the summary that its builder returned."""

    path: Path
    checksums: Checksums
    summary: dict[str, Any]
    cached: bool  # built by an earlier process


class BuildCache:
    """The cache in the folder `out` of an export. A context manager that holds the folder's lock."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / ".export"
        self._lock = FileLock(self.folder / "lock")

    def __enter__(self) -> BuildCache:
        """Create the folder and lock it.

        Raises:
            InputError: another process exports into it, or it cannot be written.
        """
        try:
            for name in ("records", "pending", "base"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"{self.out}: another process exports into this folder", "Wait for it, or choose another -o."
            ) from error
        except OSError as error:
            raise access_error(error, self.out) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def pending(self, name: str) -> Path:
        return self.folder / "pending" / name

    def base(self, name: str) -> Path:
        return self.folder / "base" / name

    def final(self, name: str, *, accepted: bool) -> Path:
        return self.out / (name if accepted else name + REJECTED)

    def places(self, name: str) -> tuple[Path, Path, Path]:
        """Return where the file `name` may be: not verified yet, accepted, or rejected."""
        return (self.pending(name), self.final(name, accepted=True), self.final(name, accepted=False))

    def require_space(self, need_bytes: int) -> None:
        """Raise `ArteError` if the disk has less than `need_bytes` free."""
        free_bytes = shutil.disk_usage(self.out).free
        if free_bytes < need_bytes:
            raise ArteError(
                f"{self.out}: about {megabytes(need_bytes)} are needed, {megabytes(free_bytes)} are free",
                "Free some space, choose another -o, or export fewer formats.",
            )

    def find(self, step: str, inputs: Any, *places: Path) -> BuiltFile | None:
        """Return the file that `step` built from the same inputs, if it is unchanged in one of `places`."""
        record = self._read(step, inputs)
        for place in places:
            if not record or not place.exists():
                continue
            try:
                checksums = checksums_of(place)
            except InputError:  # damaged since
                continue
            if checksums.sha256 == record.get("sha256"):
                return BuiltFile(place, checksums, dict(record.get("summary") or {}), cached=True)
        return None

    @contextmanager
    def building(self, target: Path) -> Iterator[None]:
        """Remove an old `target`; turn "no space left" while the block builds it into a clear error."""
        remove(target)
        with cleanup_on_full_disk(target, target.name):
            yield

    def record(self, step: str, inputs: Any, target: Path, summary: Mapping[str, Any]) -> BuiltFile:
        """Record that `step` built `target` from `inputs`."""
        checksums = checksums_of(target)
        self._write(step, inputs, sha256=checksums.sha256, summary=summary)
        return BuiltFile(target, checksums, dict(summary), cached=False)

    def find_result(self, step: str, inputs: Any) -> dict[str, Any] | None:
        """Return what `record_result` stored for the same inputs."""
        return self._read(step, inputs).get("summary")

    def record_result(self, step: str, inputs: Any, result: Mapping[str, Any]) -> None:
        """Store a result that is not a file, such as a verdict."""
        self._write(step, inputs, summary=result)

    def place(self, built: Path, name: str, *, accepted: bool) -> Path:
        """Rename a verified file to `name`, or `name` with ``.rejected``, and remove the other of the two."""
        target, other = self.final(name, accepted=accepted), self.final(name, accepted=not accepted)
        if built != target:
            if target.is_dir():  # a folder cannot be renamed over one that holds files
                remove(target)
            built.replace(target)
        remove(other)
        return target

    def close(self, *, keep_base: bool) -> None:
        """Remove what a finished export does not need; with `keep_base` the next attempt reuses the base."""
        remove(self.folder / "pending")
        if not keep_base:
            remove(self.folder / "base")

    def _read(self, step: str, inputs: Any) -> dict[str, Any]:
        """Return the record of `step`, empty if there is none for these inputs."""
        try:
            record = json.loads((self.folder / "records" / f"{step}.json").read_bytes())
        except (OSError, ValueError):
            return {}
        matches = isinstance(record, dict) and record.get("inputs") == content_key(step, inputs)
        return record if matches else {}

    def _write(self, step: str, inputs: Any, **document: Any) -> None:
        record = {"inputs": content_key(step, inputs), **document}
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_atomic(self.folder / "records" / f"{step}.json", text.encode())


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

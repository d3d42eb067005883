"""The work folder of an export: what was made from what, so that the same command goes on.

    DIR/.export/
        lock            one process at a time
        records/        a JSON file a step: the hash of its inputs, the sums of what it made
        pending/        files that are made and not verified yet
        base/           the 16-bit GGUF that the others are made from; removed at the end

A file gets its own name in DIR only by a rename, after the gate has spoken. A step's
record is written after its file is whole, so a kill between the two costs one step and
nothing else. What a record says is believed only if the file still has its sums.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from arte_edge.cache import full_disk_is_clear, megabytes, unwritable
from arte_edge.errors import ArteError, InputError
from arte_edge.models.artifact_hash import Checksums, checksums_of
from arte_edge.store import content_key, write_atomic

__all__ = ["Made", "Workshop"]

_ROOM = ".export"
REJECTED = ".rejected"


@dataclass(frozen=True)
class Made:
    """A finished step: where its file lies, its sums, and what its maker said of it."""

    path: Path
    sums: Checksums
    summary: dict[str, Any]
    was_kept: bool  # from an earlier start


class Workshop:
    """The folder DIR of one export. Use it as a context manager: it holds the lock."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.room = out / _ROOM
        self._lock = FileLock(self.room / "lock")

    def __enter__(self) -> Workshop:
        """Make the folder and lock it.

        Raises:
            InputError: another process exports into it, or it cannot be written.
        """
        try:
            for name in ("records", "pending", "base"):
                (self.room / name).mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"{self.out}: another process exports into this folder", "Wait for it, or choose another -o."
            ) from error
        except OSError as error:
            raise unwritable(error, self.out) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def pending(self, name: str) -> Path:
        return self.room / "pending" / name

    def base(self, name: str) -> Path:
        return self.room / "base" / name

    def final(self, name: str, *, accepted: bool) -> Path:
        return self.out / (name if accepted else name + REJECTED)

    def require_room(self, need_bytes: int) -> None:
        """Raise if the disk cannot take `need_bytes` more.

        Raises:
            ArteError: it cannot; says how much is needed and how much is free.
        """
        free_bytes = shutil.disk_usage(self.out).free
        if free_bytes < need_bytes:
            raise ArteError(
                f"{self.out}: about {megabytes(need_bytes)} are needed, {megabytes(free_bytes)} are free",
                "Free some space, choose another -o, or ask for fewer formats.",
            )

    def make(
        self, step: str, inputs: Any, target: Path, build: Callable[[Path], dict[str, Any]], *also: Path
    ) -> Made:
        """Return what `step` makes from `inputs`, building it at `target` unless it is there.

        Args:
            also: other places where an earlier start may have put the file.

        Raises:
            ArteError: whatever `build` raises, or a full disk.
        """
        key = content_key(step, inputs)
        if made := self._kept(step, key, (target, *also)):
            return made
        remove(target)
        with full_disk_is_clear(target, target.name):
            summary = build(target)
        sums = checksums_of(target)
        document = {"inputs": key, "sha256": sums.sha256, "summary": summary}
        self._write(step, document)
        return Made(target, sums, summary, was_kept=False)

    def _kept(self, step: str, key: str, places: Sequence[Path]) -> Made | None:
        record = self._read(step)
        if record.get("inputs") != key:
            return None
        for place in places:
            if not place.exists():
                continue
            try:
                sums = checksums_of(place)
            except InputError:  # damaged since
                continue
            if sums.sha256 == record.get("sha256"):
                return Made(place, sums, dict(record.get("summary") or {}), was_kept=True)
        return None

    def recall(self, step: str, inputs: Any) -> dict[str, Any] | None:
        """Return what `note` kept under the same inputs."""
        record = self._read(step)
        summary = record.get("summary")
        return summary if record.get("inputs") == content_key(step, inputs) and summary is not None else None

    def note(self, step: str, inputs: Any, summary: dict[str, Any]) -> None:
        """Keep a result that is no file, such as a verdict."""
        self._write(step, {"inputs": content_key(step, inputs), "summary": summary})

    def place(self, made: Path, name: str, *, accepted: bool) -> Path:
        """Give a verified file its name: `name`, or `name` with ``.rejected``. The other of the two goes."""
        target, other = self.final(name, accepted=accepted), self.final(name, accepted=not accepted)
        if made != target:
            if target.is_dir():  # a folder cannot be renamed over one that holds files
                remove(target)
            made.replace(target)
        remove(other)
        return target

    def close(self, *, keep_base: bool) -> None:
        """Remove what the finished export does not need; with `keep_base` the next attempt starts from it."""
        remove(self.room / "pending")
        if not keep_base:
            remove(self.room / "base")

    def _read(self, step: str) -> dict[str, Any]:
        try:
            record = json.loads((self.room / "records" / f"{step}.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _write(self, step: str, document: dict[str, Any]) -> None:
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        write_atomic(self.room / "records" / f"{step}.json", text.encode())


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

"""The run folder: results survive a killed process.

    runs/<name>/
        run.toml        the resolved configuration; it determines whether a folder belongs to a run
        calls.jsonl     all engine calls of the run, keyed by their content; in a study, a link to the store of its runs
        events.jsonl    events with times
        <stage>/        manifest.json and the stage's data, one JSONL file each

A call's key is the sha256 of model identity, rendered prompt, sampling and sample number, not of code, stage or
file names: changing a later setting repeats no call. Calls are appended in groups, each written at once and
fsynced. Logits depend on the other prompts of a batch, so an incomplete group is dropped when the file is
opened, and the same group is decoded again: a killed run ends with the same data as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from arte_edge.cache import disk_errors, write_atomic
from arte_edge.errors import ArteError
from arte_edge.files import json_loads

Row = dict[str, Any]

# Files with a checksum in a stage's manifest: its data, and weights that later stages load.
_HASHED = {".jsonl", ".gguf", ".safetensors"}


def content_key(*parts: Any) -> str:
    """Return the sha256 of `parts` as canonical JSON."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _line(row: Row) -> bytes:
    # A server that splits an emoji sends a lone surrogate; json.loads reads it back.
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass") + b"\n"


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write all `rows` atomically, one JSON object a line."""
    write_atomic(path, b"".join(_line(row) for row in rows))


def read_jsonl(path: Path) -> list[Row]:
    """Read a file that `write_jsonl` wrote. Raises ArteError: a line is not a JSON object."""
    rows: list[Row] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        row = parse_line(line)
        if row is None:
            raise ArteError(f"{path}:{number}: not a JSON object", "Remove the stage's folder to run it again.")
        rows.append(row)
    return rows


def parse_line(line: bytes) -> Row | None:
    """Return the JSON object in a line, None if it holds none."""
    try:
        value = json_loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return None
    return value if isinstance(value, dict) else None


# What a row may hold, and of which type; the rest belongs to whoever wrote it.
_TYPES = {"key": str, "left": int, "text": str, "finish": str, "logp": list}
_TYPES |= dict.fromkeys(("prompt_tokens", "completion_tokens", "cached_tokens"), int)


def _is_call(row: Row) -> bool:
    """Return whether a row has the form of a call, so that a damaged line is found when the file is opened."""
    if not all(isinstance(row[name], kind) for name, kind in _TYPES.items() if name in row):
        return False
    numbers = (value for values in row.get("logp", ()) for value in (values if isinstance(values, list) else [""]))
    return {"key", "left"} <= row.keys() and all(isinstance(value, int | float) for value in numbers)


class CallLog:
    """An append-only JSONL file of rows with a ``key``, written in atomic groups.

    A row with the status "error" does not count as done: the next run repeats the call.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done: dict[str, Row] = {}
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._size = self._recover()

    def __len__(self) -> int:
        return len(self._done)

    def get(self, key: str, *names: str) -> Row | None:
        """Return the finished row of `key`, if there is one that has all of `names`."""
        row = self._done.get(key)
        return row if row is not None and all(name in row for name in names) else None

    def append(self, rows: Sequence[Row]) -> None:
        """Append `rows` as one group and fsync: all or none.

        Raises ArteError: the disk is full; the file is unchanged.
        """
        if not rows:
            return
        data = b"".join(_line({**row, "left": len(rows) - 1 - i}) for i, row in enumerate(rows))
        with disk_errors(self.path):
            try:
                written = 0
                while written < len(data):
                    written += os.pwrite(self._fd, data[written:], self._size + written)
                os.fsync(self._fd)
            except OSError:
                os.ftruncate(self._fd, self._size)
                raise
        self._size += len(data)
        for row in rows:
            self._remember(row)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _remember(self, row: Row) -> None:
        if row.get("status") != "error":
            self._done[row["key"]] = row

    def _recover(self) -> int:
        """Read complete groups, truncate an incomplete one at the end, return the size in bytes."""
        rows, size = read_groups(self.path)
        for row in rows:
            self._remember(row)
        os.ftruncate(self._fd, size)
        return size


def read_groups(path: Path, start: int = 0) -> tuple[list[Row], int]:
    """Return the rows of a store's complete groups from byte `start` on, and the byte at which the last one ends.

    Raises ArteError: a line is no call; names it.
    """
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    size = offset = start
    rows: list[Row] = []
    group: list[Row] = []
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        row = parse_line(line) if line.endswith(b"\n") else None
        if row is None or not _is_call(row):
            if line.endswith(b"\n"):
                where = f"{path}:{number}" if not start else f"{path}, {number} lines after byte {start}"
                raise ArteError(
                    f"{where}: this line is damaged",
                    "Delete the line (its call is repeated) and run the same command again.",
                )
            break
        offset += len(line)
        group.append(row)
        if row["left"] == 0:
            rows += group
            group, size = [], offset
    return rows, size


class Stage:
    """One stage's folder: its data files, and a manifest once it is done.

    `todo` is False if it is done from the same inputs and its files are unchanged. What `counts` gives when the
    stage finishes becomes ``calls`` of its summary, if it is anything.
    """

    def __init__(self, folder: Path, inputs: Any, counts: Callable[[], Row] = dict) -> None:
        self.folder, self._counts = folder, counts
        self.inputs = content_key(inputs)
        self._manifest = self._read_manifest()

    @property
    def todo(self) -> bool:
        return self._manifest is None

    @property
    def summary(self) -> Row:
        return dict(self._done()["summary"])

    @property
    def files(self) -> dict[str, str]:
        """The sha256 of each file of the finished stage."""
        return dict(self._done()["files"])

    def _done(self) -> Row:
        assert self._manifest is not None, "the stage has not finished"
        return self._manifest

    def _read_manifest(self) -> Row | None:
        try:
            manifest = json_loads((self.folder / "manifest.json").read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(manifest, dict) or manifest.get("inputs") != self.inputs:
            return None
        if not all(isinstance(manifest.get(key), dict) for key in ("files", "summary")):
            return None
        same = all(file_sha256(self.folder / name) == sha for name, sha in manifest["files"].items())
        return manifest if same else None

    def forget(self) -> None:
        """Let the stage run again."""
        self._manifest = None

    def finish(self, summary: Row) -> None:
        """Record the stage's files (by sha256) and `summary`: the stage is done."""
        files = {
            str(path.relative_to(self.folder)): file_sha256(path)
            for path in sorted(self.folder.rglob("*"))
            if path.suffix in _HASHED and not any(part.startswith(".") for part in path.relative_to(self.folder).parts)
        }
        calls = self._counts()
        summary = summary | ({"calls": calls} if calls else {})
        manifest = {"inputs": self.inputs, "files": files, "summary": summary}
        data = json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n"
        write_atomic(self.folder / "manifest.json", data)
        self._manifest = manifest

    def write(self, name: str, rows: Iterable[Row]) -> None:
        write_jsonl(self.folder / name, rows)

    def read(self, name: str) -> list[Row]:
        return read_jsonl(self.folder / name)


def link_folder(source: Path, target: Path) -> None:
    """Make `target` a copy of a folder, or a file, in place of what was there: hard links where the disk has them."""
    staged = target.with_name(f".{target.name}")
    shutil.rmtree(staged, ignore_errors=True)
    with disk_errors(target):
        if source.is_file():
            staged.unlink(missing_ok=True)
            _link(str(source), str(staged))
        else:
            shutil.copytree(source, staged, copy_function=_link)
            shutil.rmtree(target, ignore_errors=True)
    staged.replace(target)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, empty if it is missing."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

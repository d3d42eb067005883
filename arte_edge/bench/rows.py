"""``bench.jsonl``: every row that was ever measured, beside the files it is about.

Rows are only ever appended, one JSON object a line, each group written at once and fsynced. A line
that a crash cut off is dropped; it is the last one, since nothing is written behind it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from arte_edge.bench.result import SCHEMA_VERSION, QualityRow, SpeedRow
from arte_edge.errors import ArteError, InputError

__all__ = ["FILE_NAME", "append_rows", "read_rows"]

FILE_NAME = "bench.jsonl"


def append_rows(path: Path, rows: Sequence[SpeedRow | QualityRow]) -> None:
    """Append `rows` to `path`, which need not exist. They are on the disk when this returns.

    Raises:
        InputError: the file cannot be written.
        ArteError: the disk is full; the file is as it was before.
    """
    if not rows:
        return
    data = b"".join(row.model_dump_json().encode() + b"\n" for row in rows)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        size = _whole_bytes(descriptor)
        try:
            os.lseek(descriptor, size, os.SEEK_SET)
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise ArteError(
                f"{path}: {error.strerror}; what was there before is kept",
                "Free some space and measure again.",
            ) from error
    finally:
        os.close(descriptor)


def read_rows(path: Path) -> list[SpeedRow | QualityRow]:
    """Return the rows of `path` in their order; empty if there is no such file.

    Raises:
        InputError: a line other than the last is damaged, or a row has a version we do not know.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    lines = data.split(b"\n")
    rows: list[SpeedRow | QualityRow] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        document = _parsed(line)
        if document is None:
            if number == len(lines):  # no newline behind it: torn
                break
            raise InputError(f"{path}:{number}: not a JSON object", "Delete the line; it is one result.")
        rows.append(_row(document, f"{path}:{number}"))
    return rows


def _row(document: dict[str, Any], where: str) -> SpeedRow | QualityRow:
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{where}: schema_version is {version}, this arte-edge knows {SCHEMA_VERSION}",
            "Read it with the arte-edge that wrote it, or a newer one.",
        )
    kind = SpeedRow if "test" in document else QualityRow
    try:
        return kind.model_validate_json(json.dumps(document))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise InputError(f"{where}: {key}: {problem['msg']}", "Delete the line; it is one result.") from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _whole_bytes(descriptor: int) -> int:
    """Return how long the file is without a torn last line; a whole one without newline gets its newline."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    tail, at = b"", size
    while at > 0 and b"\n" not in tail:
        step = min(1 << 16, at)
        at -= step
        os.lseek(descriptor, at, os.SEEK_SET)
        tail = os.read(descriptor, step) + tail
    last = tail.rpartition(b"\n")[2]
    if not last:
        return size
    if _parsed(last) is not None:
        os.lseek(descriptor, size, os.SEEK_SET)
        return size + os.write(descriptor, b"\n")
    return size - len(last)

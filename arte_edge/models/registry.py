"""The models that have a name: which bytes each one is, where they come from, and how they are fetched.

Shipped entries are one TOML a model in ``registry/``. A user adds models in an own ``models.toml``, one ``[[model]]`` a
model with the same keys and a ``name``; an entry there overrides a shipped one of the same name. The sha256 identifies
a model; the Hub and the mirror (packages of the Python index, for places that cannot reach the Hub) are two sources of
the same bytes. Two processes that need the same model wait for one download.
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
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from arte_edge import catalog
from arte_edge.cache import (
    DISK_FULL_MESSAGES,
    DiskFull,
    Progress,
    cache_dir,
    cache_subdir,
    check_free_space,
    cleanup_on_full_disk,
    is_offline,
    locked,
    rename_into_place,
    sha256_file,
    user_registry,
    write_atomic,
)
from arte_edge.errors import ArteError, InputError, nearest
from arte_edge.files import json_loads, read_toml, validated

_KEYS = "The keys are described in docs/models.md."
_POLL_S = 0.2
# The file itself, one wheel of a mirror beside it, and a little for the file system.
_SPARE_BYTES = 120_000_000

_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# No slash: that would be a path or a Hub id.
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
# A plain file name: an entry must not be able to write outside its folder.
_FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.+-]*\.gguf$")]
_HubId = Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]
# Only what can be a distribution name or version: they are passed to pip.
_Package = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]*$")]
_Version = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.!+-]*$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hub(_Frozen):
    """A repository of the Hugging Face Hub and the commit, tag or branch to read."""

    id: _HubId
    revision: str = "main"


class Part(_Frozen):
    """One piece of the file: a package of the Python index and the path inside its wheel."""

    package: _Package
    member: str


class Mirror(_Frozen):
    """Packages that carry the same bytes, joined in the order of `parts`."""

    version: _Version
    parts: tuple[Part, ...] = Field(min_length=1)


class Entry(_Frozen):
    """One model of the registry."""

    name: _Name
    description: str = ""
    role: Literal["student", "teacher"]
    license: str
    license_url: str = ""
    file: _FileName
    size_bytes: int = Field(gt=0)
    sha256: _Sha256
    hub: Hub | None = None
    mirror: Mirror | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> Entry:
        if self.hub is None and self.mirror is None:
            raise ValueError("needs [hub], [mirror] or both: without one the file cannot be fetched")
        return self


def entries() -> dict[str, Entry]:
    """Return every known model by name, the user's own over the shipped ones, sorted by name.

    Raises InputError: an entry is not valid TOML or breaks the schema; says which file and key.
    """
    found: dict[str, Entry] = {}
    for name in catalog.names("models"):
        path = catalog.find("models", name)
        found[name] = validated(Entry, read_toml(path) | {"name": name}, f"{path}: {name}", _KEYS)
    path = user_registry()
    if path.is_file():
        for table in _own(path):
            own = validated(Entry, table, f"{path}: {table.get('name', 'model')}", _KEYS)
            found[own.name] = own
    return dict(sorted(found.items()))


def entry(name: str) -> Entry:
    """Return the entry called `name`. Raises InputError: no such model; the hint names the nearest one."""
    known = entries()
    if name not in known:
        raise InputError(
            f"No model is named '{name}'",
            f"{nearest(name, known)} Or give a .gguf file, a checkpoint folder or a Hub id (org/name).",
        )
    return known[name]


def _own(path: Path) -> list[dict[str, Any]]:
    """Return the ``[[model]]`` tables of the user's file."""
    content = read_toml(path, "Fix or remove the file.")
    tables = content.pop("model", [])
    if content or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        what = f"unknown key '{next(iter(content))}'" if content else "'model' is not a list of tables"
        raise InputError(f"{path}: {what}", "Begin each model with a line [[model]]; see docs/models.md.")
    return tables


def place(entry: Entry) -> Path:
    """Return the path of the file of `entry` in the cache; it need not exist."""
    return cache_dir() / "models" / entry.name / entry.file


def cached(entry: Entry, *, since_boot: bool = False) -> Path | None:
    """Return the file of `entry` if it is in the cache and complete; `since_boot` as in `sha256_file`."""
    path = place(entry)
    if not path.is_file() or path.stat().st_size != entry.size_bytes:
        return None
    return path if sha256_file(path, since_boot=since_boot) == entry.sha256 else None


def pull(entry: Entry, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """Return the file of `entry`, fetching it if it is not in the cache.

    Raises:
        InputError: not in the cache, and offline.
        DiskFull: it does not fit.
        ArteError: no source has it; names the error of each.
    """
    if path := cached(entry, since_boot=True):
        return path
    if is_offline(offline):
        if place(entry).is_file():
            raise InputError(
                f"{place(entry)}: damaged, its bytes are no longer those of '{entry.name}'",
                f"With network: arte-edge models pull {entry.name} fetches it again.",
            )
        raise InputError(
            f"Model '{entry.name}' is not in the cache, and this run is offline",
            f"Once with network: arte-edge models pull {entry.name}",
        )
    with locked(entry.name, progress):
        if path := cached(entry):  # another process was first
            return path
        final = place(entry)
        final.unlink(missing_ok=True)  # damaged since it was fetched
        staging = cache_subdir("staging", f"{entry.name}-{entry.sha256[:12]}")
        with cleanup_on_full_disk(staging, f"model '{entry.name}'"):
            staged = _from_hub_or_mirror(entry, staging, progress)
            rename_into_place(staged, final)
        shutil.rmtree(staging, ignore_errors=True)
        sha256_file(final)  # cached for the next call
        return final


def _from_hub_or_mirror(entry: Entry, staging: Path, progress: Progress | None) -> Path:
    """Return a verified file in `staging` from the first source that has it."""
    have_bytes = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    need_bytes = entry.size_bytes - have_bytes + (_SPARE_BYTES if entry.mirror else 0)
    check_free_space(staging, min(need_bytes, 2 * entry.size_bytes), f"model '{entry.name}'")
    sources: list[tuple[str, Callable[[Entry, Path, Progress | None], Path]]] = []
    if entry.hub:
        sources.append((f"Hub {entry.hub.id}", _fetch_from_hub))
    if entry.mirror:
        sources.append((f"mirror {entry.mirror.parts[0].package}", _fetch_from_mirror))
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
        "\n".join([*failures, "Partial downloads are cached: re-run the same command to resume."]),
    )


def _fetch_from_hub(entry: Entry, staging: Path, progress: Progress | None) -> Path:
    from arte_edge.models import hub

    assert entry.hub is not None
    hub.probe()
    file = hub.HubFile(entry.file, entry.size_bytes, entry.sha256)
    hub.fetch(entry.hub.id, entry.hub.revision, [file], staging, progress)
    return staging / entry.file


def _verified(staged: Path, folder: Path, entry: Entry) -> Path:
    """Return `staged` if its bytes are those of `entry`; remove them otherwise."""
    found = sha256_file(staged)
    if found == entry.sha256:
        return staged
    shutil.rmtree(folder)
    raise ArteError(
        f"checksum mismatch: sha256 {found[:16]}…, expected {entry.sha256[:16]}…",
        "The file was removed. Do not use this source before you know why it differs.",
    )


def _fetch_from_mirror(entry: Entry, staging: Path, progress: Progress | None = None) -> Path:
    """Join the parts of `entry`'s mirror in `staging` and return the file, not verified yet.

    Large files are cut into wheels there. One wheel at a time is downloaded with pip (so the machine's own index, proxy
    and certificates apply), its piece is appended to the file, and the new length is written down: a killed download
    resumes after the last whole piece. Nothing of a wheel is ever installed or run.

    Raises ArteError: pip is missing or failed, or a wheel lacks its piece; OSError: the disk is full, among others.
    """
    mirror = entry.mirror
    assert mirror is not None
    if find_spec("pip") is None:
        raise ArteError("the mirror needs pip, which this Python does not have", f"{sys.executable} -m ensurepip")
    for left_over in staging.glob("wheel-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    joined, journal = staging / entry.file, staging / "mirror.json"
    done, size_bytes = _resumed(journal, joined)
    with joined.open("r+b" if joined.exists() else "w+b") as file:
        file.truncate(size_bytes)
        file.seek(size_bytes)
        for number, part in enumerate(mirror.parts[done:], start=done + 1):
            label = f"part {number} of {len(mirror.parts)}"
            with tempfile.TemporaryDirectory(dir=staging, prefix="wheel-") as folder:
                wheel = _download_part(mirror, part, Path(folder), entry, label, file.tell(), progress)
                _append_piece(wheel, part, file)
            file.flush()
            os.fsync(file.fileno())
            write_atomic(journal, json.dumps({"parts": number, "size_bytes": file.tell()}).encode())
            if progress:
                progress(label, file.tell(), entry.size_bytes)
    return joined


def _resumed(journal: Path, joined: Path) -> tuple[int, int]:
    """Return how many parts are already in `joined`, and its length after them."""
    try:
        state = json_loads(journal.read_text("utf-8"))
        parts, size_bytes = int(state["parts"]), int(state["size_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
    whole = joined.exists() and joined.stat().st_size >= size_bytes
    return (parts, size_bytes) if whole else (0, 0)


def _download_part(
    mirror: Mirror, part: Part, folder: Path, entry: Entry, label: str, before: int, progress: Progress | None
) -> Path:
    """Run ``pip download`` for one part into `folder` and return the wheel."""
    wheels, scratch = folder / "wheels", folder / "scratch"
    wheels.mkdir()
    scratch.mkdir()
    # --only-binary: building the metadata of a source package runs code.
    # --no-cache-dir: else pip caches every file a second time.
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
        raise _pip_failure(part, log.read_text("utf-8", errors="replace"), folder)
    return found[0]


def _bytes_below(folder: Path) -> int:
    """Return the size of what pip has written so far; files and folders may vanish while we look."""
    total = 0
    for parent, _, names in os.walk(folder):  # skips a folder that is gone, where rglob raises
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).stat().st_size
    return total


def _pip_failure(part: Part, output: str, folder: Path) -> ArteError:
    """Turn pip's output into an error; a user name and password in an index address stay out of it."""
    if any(mark in output for mark in DISK_FULL_MESSAGES):
        return DiskFull(folder, f"the wheel of {part.package}")
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")] or output.splitlines()[-1:]
    reason = re.sub(r"//[^/\s@]+@", "//", "; ".join(line.removeprefix("ERROR: ") for line in errors[:2]))
    return ArteError(f"pip cannot download {part.package}: {reason or 'no message'}")


def _append_piece(wheel: Path, part: Part, file: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
            shutil.copyfileobj(source, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ArteError(f"{wheel.name} does not hold {part.member} ({error})") from error

"""Models of the Hugging Face Hub: found, downloaded whole, and checked against their sha256.

The Hub's own library does the transfers: resume, tokens and proxies are its work. All its errors become one `HubError`
with a plain reason, so that a mirror can be tried. A short probe comes first: without it an unreachable Hub costs the
library's retries, a minute and more.

A model named by its Hub id gets a folder for each commit, which appears when all its files are there and match the
checksums that the Hub lists for large files; the commit that a branch pointed to is recorded, so that the same id works
later without network. Two processes that need the same model wait for one download.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from arte_edge.cache import (
    DISK_FULL_MESSAGES,
    DiskFull,
    Progress,
    cache_dir,
    cache_subdir,
    check_free_space,
    cleanup_on_full_disk,
    is_disk_full,
    is_offline,
    locked,
    rename_into_place,
    sha256_file,
    slug,
)
from arte_edge.errors import ArteError, InputError, first_line

if TYPE_CHECKING:
    from huggingface_hub.utils.tqdm import tqdm

_PROBE_S = 4.0
_ANSWER_S = 10.0
_T = TypeVar("_T")


class HubError(ArteError):
    """The Hub did not deliver what was requested."""


@dataclass(frozen=True)
class HubFile:
    """One file of a repository; `sha256` is known for large files only."""

    name: str
    size_bytes: int
    sha256: str = ""


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    id: str
    commit: str
    files: tuple[HubFile, ...]


def endpoint() -> str:
    """Return the address of the Hub: ``HF_ENDPOINT``, or the public one."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def probe() -> None:
    """Raise `HubError` unless the Hub answers within a few seconds."""
    import httpx

    try:
        httpx.head(endpoint(), timeout=_PROBE_S)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        reason = "no answer in time" if isinstance(error, httpx.TimeoutException) else "no connection"
        raise HubError(
            f"the Hub ({endpoint()}) cannot be reached: {reason}",
            "Check the network or HF_ENDPOINT; or give the path of a local file instead of a name.",
        ) from error


def describe(hub_id: str, revision: str) -> Repository:
    """Return the commit that `revision` names and the files it holds.

    Raises HubError: unreachable, unknown, private or gated repository, or unknown revision.
    """
    from huggingface_hub import HfApi

    probe()
    options: dict[str, Any] = {"revision": revision, "files_metadata": True, "timeout": _ANSWER_S}
    info = _call(hub_id, revision, lambda: HfApi(endpoint=endpoint()).model_info(hub_id, **options))
    files = (HubFile(f.rfilename, f.size or 0, f.lfs.sha256 if f.lfs else "") for f in info.siblings or ())
    return Repository(hub_id, info.sha or revision, tuple(files))


def fetch(
    hub_id: str, revision: str, files: Iterable[HubFile], staging: Path, progress: Progress | None = None
) -> None:
    """Download `files` into `staging`; partial files of an earlier attempt are resumed.

    Raises HubError: as `describe`, or no such file; OSError: the disk is full.
    """
    from huggingface_hub import hf_hub_download

    listed = list(files)
    total_bytes, before_bytes = sum(file.size_bytes for file in listed), 0
    for file in listed:

        def download(file: HubFile = file, before_bytes: int = before_bytes) -> str:
            return hf_hub_download(
                hub_id,
                file.name,
                revision=revision,
                local_dir=staging,
                endpoint=endpoint(),
                etag_timeout=_ANSWER_S,
                tqdm_class=_reporting_bar(file.name, before_bytes, total_bytes, progress),
            )

        _call(hub_id, revision, download)
        before_bytes += file.size_bytes


def _call(hub_id: str, revision: str, call: Callable[[], _T]) -> _T:
    """Run one call of the Hub's library; its errors of network and access become a `HubError`."""
    from huggingface_hub import errors

    where, resume = f"{hub_id}@{revision}", "Re-run the same command to resume."
    try:
        return call()
    except errors.GatedRepoError as error:
        raise HubError(
            f"{hub_id} is gated on the Hub", f"Accept its terms at {endpoint()}/{hub_id}, then 'hf auth login'."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the Hub has no public repository {hub_id}",
            "Check the spelling; for a private one log in with 'hf auth login'.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{hub_id} has no revision '{revision}'", "Give a branch, tag or commit.") from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # raised without a network
            raise HubError(f"the connection to the Hub broke while reading {where}", resume) from error
        raise HubError(f"{where} does not hold the requested file") from error
    except Exception as error:
        # The library uses httpx or httpx2 by its version, and xet has errors of its own: there is no common
        # base class for a failed network or a full disk.
        if isinstance(error, OSError) and is_disk_full(error):
            raise
        if any(mark in str(error) for mark in DISK_FULL_MESSAGES):
            raise DiskFull(cache_dir(), where) from error
        what = f"{type(error).__name__}: {first_line(error):.200}"
        raise HubError(f"the Hub failed on {where}: {what}", resume) from error


def _reporting_bar(name: str, before_bytes: int, total_bytes: int, progress: Progress | None) -> type[tqdm]:
    """Return a silent progress bar class, the only channel through which the library reports progress."""
    from huggingface_hub.utils.tqdm import tqdm as base

    class Bar(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            self.n = kwargs.get("initial", 0) or 0

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            if progress:
                progress(name, int(before_bytes + self.n), total_bytes)
            return None

    return Bar


# What a checkpoint needs and nothing that could run code: no pickles, no modules.
_CHECKPOINT = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt")


def from_hub(
    hub_id: str, revision: str, quant: str, *, offline: bool = False, progress: Progress | None = None
) -> Path:
    """Return the checkpoint folder of `hub_id`, or the file if it is a GGUF.

    Args:
        quant: selects a GGUF ("Q4_K_M"); if empty, the checkpoint, or the only GGUF.

    Raises:
        InputError: offline and not here; no model in it; several GGUFs or none fit `quant`.
        HubError: the Hub does not deliver it.
    """
    base = cache_dir() / "hub" / slug(hub_id)
    ref = base / "refs" / slug(f"{revision}:{quant}")
    settled = is_offline(offline) or re.fullmatch(r"[0-9a-f]{40}", revision)  # a commit never changes
    if settled and (found := _recorded(ref, base)):
        return found
    if is_offline(offline):
        raise InputError(
            f"{hub_id}@{revision} is not in the cache, and this run is offline",
            f"Once with network: arte-edge models pull {hub_id}",
        )
    try:
        repository = describe(hub_id, revision)
    except HubError as error:
        if found := _recorded(ref, base):
            if progress:
                progress(f"{error.message}; the copy in the cache is used", 0, 0)
            return found
        raise
    files = _selected(repository, quant)
    folder = f"{repository.commit[:12]}{'-' + slug(quant or 'gguf') if _is_gguf(files) else ''}"
    with locked(f"{hub_id}-{folder}", progress):
        if not (base / folder).is_dir():
            _fetch(repository, files, base / folder, progress)
    target = f"{folder}/{files[0].name}" if _is_gguf(files) else folder
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(target, "utf-8")
    return base / target


def _recorded(ref: Path, base: Path) -> Path | None:
    """Return what `ref` resolved to the last time, if that is still here."""
    if not ref.is_file():
        return None
    found = base / ref.read_text("utf-8")
    return found if found.exists() else None


def _is_gguf(files: list[HubFile]) -> bool:
    return files[0].name.endswith(".gguf")


def _selected(repository: Repository, quant: str) -> list[HubFile]:
    """Return the files to fetch: one GGUF, or those of a checkpoint."""
    ggufs = [file for file in repository.files if file.name.endswith(".gguf")]
    top = [file for file in repository.files if "/" not in file.name]
    names = [file.name for file in top]
    if not quant and "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return [f for f in top if any(fnmatch.fnmatch(f.name, pattern) for pattern in _CHECKPOINT)]
    if quant:
        label = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
        ggufs = [file for file in ggufs if label.search(file.name)]
    if len(ggufs) == 1:
        return ggufs
    known = ", ".join(file.name for file in repository.files if file.name.endswith(".gguf"))
    if not known:
        hint = "Choose another repository."
        raise InputError(f"{repository.id} holds no safetensors checkpoint and no GGUF", hint)
    what = f"{len(ggufs)} GGUF files" if ggufs else "no GGUF"
    hint = f"Pick one as {repository.id}:Q4_K_M. It holds: {known}"
    raise InputError(f"{repository.id} holds {what}" + (f" '{quant}'" if quant else ""), hint)


def _fetch(repository: Repository, files: list[HubFile], final: Path, progress: Progress | None) -> None:
    staging = cache_subdir("staging", f"{slug(repository.id)}-{final.name}")
    what = f"{repository.id}@{repository.commit[:12]}"
    with cleanup_on_full_disk(staging, what):
        have_bytes = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
        check_free_space(staging, sum(file.size_bytes for file in files) - have_bytes, what)
        fetch(repository.id, repository.commit, files, staging, progress)
        for file in files:
            path = staging / file.name
            if file.sha256 and sha256_file(path) != file.sha256:
                path.unlink()
                raise HubError(
                    f"{what}: {file.name} does not match its checksum and was removed",
                    "The same command fetches it again.",
                )
        shutil.rmtree(staging / ".cache", ignore_errors=True)  # the library's records of its downloads
        rename_into_place(staging, final)

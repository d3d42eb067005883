"""Fetch files of the Hugging Face Hub with its own library: resume, tokens and proxies are its work.

Everything that goes wrong there becomes one `HubError` with a plain reason, so
that a caller can say it or try the mirror. A short probe comes first: without it
an unreachable Hub costs the library's retries, a minute and more.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from arte_edge.cache import FULL_MARKS, DiskFull, Progress, home
from arte_edge.errors import ArteError

if TYPE_CHECKING:
    from huggingface_hub.utils.tqdm import tqdm

__all__ = ["HubError", "HubFile", "Repository", "describe", "endpoint", "fetch", "probe"]

_PROBE_S = 4.0
_ANSWER_S = 10.0
_T = TypeVar("_T")


class HubError(ArteError):
    """The Hub did not give what was asked."""


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
            "Check the network or HF_ENDPOINT; with files at hand, give their path instead of a name.",
        ) from error


def describe(hub_id: str, revision: str) -> Repository:
    """Return the commit that `revision` stands for and the files it holds.

    Raises:
        HubError: unreachable, unknown, private or gated repository, or unknown revision.
    """
    from huggingface_hub import HfApi

    probe()
    info = _asked(
        hub_id,
        revision,
        lambda: HfApi(endpoint=endpoint()).model_info(
            hub_id, revision=revision, files_metadata=True, timeout=_ANSWER_S
        ),
    )
    files = [
        HubFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else "")
        for file in info.siblings or []
    ]
    return Repository(hub_id, info.sha or revision, tuple(files))


def fetch(
    hub_id: str, revision: str, files: Iterable[HubFile], staging: Path, progress: Progress | None = None
) -> None:
    """Download `files` into `staging`; what an earlier attempt left there is gone on with.

    Raises:
        HubError: as `describe`, or no such file.
        OSError: the disk is full.
    """
    from huggingface_hub import hf_hub_download

    wanted = list(files)
    total_bytes, before_bytes = sum(file.size_bytes for file in wanted), 0
    for file in wanted:

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

        _asked(hub_id, revision, download)
        before_bytes += file.size_bytes


def _asked(hub_id: str, revision: str, call: Callable[[], _T]) -> _T:
    """Run one call of the Hub's library; whatever it raises for network or rights is a `HubError`."""
    from huggingface_hub import errors

    where = f"{hub_id}@{revision}"
    try:
        return call()
    except errors.GatedRepoError as error:
        raise HubError(
            f"{hub_id} is gated on the Hub",
            f"Accept its terms at {endpoint()}/{hub_id}, then 'hf auth login'.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the Hub has no public repository {hub_id}",
            "Check the spelling; for a private one log in with 'hf auth login'.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{hub_id} has no revision '{revision}'", "Give a branch, tag or commit.") from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # its way of saying "no network"
            raise HubError(f"the Hub broke off while reading {where}", "The same command goes on.") from error
        raise HubError(f"{where} does not hold the file asked for") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise HubError(
            f"the Hub failed on {where}: {_first_line(error)}", "The same command goes on."
        ) from error
    except Exception as error:
        # The library speaks httpx or httpx2 by its version, and xet has errors of its own:
        # no common base class names "the network failed", nor "the disk is full".
        if any(mark in str(error) for mark in FULL_MARKS):
            raise DiskFull(home(), where) from error
        raise HubError(
            f"the Hub failed on {where}: {_first_line(error)}", "The same command goes on."
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _reporting_bar(name: str, before_bytes: int, total_bytes: int, progress: Progress | None) -> type[tqdm]:
    """Return a silent progress bar class, the only channel through which the library tells its progress."""
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

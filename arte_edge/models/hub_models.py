"""Models named by their Hub id alone: a checkpoint, or one GGUF picked by its quantization.

Every commit has its own folder, which appears when all its files are there and
their sums agree with those the Hub gives for large files. The commit that a branch
stood for is written down, so that the same id works later without network.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
from pathlib import Path

from arte_edge.cache import (
    Progress,
    check_room,
    full_disk_is_clear,
    home,
    is_offline,
    locked,
    publish,
    room,
    sha256_file,
    slug,
)
from arte_edge.errors import InputError
from arte_edge.models import hub

__all__ = ["from_hub"]

# What a checkpoint needs and nothing that could run code: no pickles, no modules.
_CHECKPOINT = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt")


def from_hub(
    hub_id: str, revision: str, quant: str, *, offline: bool = False, progress: Progress | None = None
) -> Path:
    """Return the checkpoint folder of `hub_id`, or the file if it is a GGUF.

    Args:
        quant: picks a GGUF ("Q4_K_M"); empty takes the checkpoint, or the only GGUF.

    Raises:
        InputError: offline and not here; no model in it; several GGUFs or none fit `quant`.
        HubError: the Hub does not give it.
    """
    base = home() / "hub" / slug(hub_id)
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
        repository = hub.describe(hub_id, revision)
    except hub.HubError as error:
        if found := _recorded(ref, base):
            if progress:
                progress(f"{error.message}; the copy in the cache is used", 0, 0)
            return found
        raise
    files = _wanted(repository, quant)
    folder = f"{repository.commit[:12]}{'-' + slug(quant or 'gguf') if _is_gguf(files) else ''}"
    with locked(f"{hub_id}-{folder}", progress):
        if not (base / folder).is_dir():
            _fetch(repository, files, base / folder, progress)
    target = f"{folder}/{files[0].name}" if _is_gguf(files) else folder
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(target, "utf-8")
    return base / target


def _recorded(ref: Path, base: Path) -> Path | None:
    """Return what `ref` led to the last time, if that is still here."""
    if not ref.is_file():
        return None
    found = base / ref.read_text("utf-8")
    return found if found.exists() else None


def _is_gguf(files: list[hub.HubFile]) -> bool:
    return files[0].name.endswith(".gguf")


def _wanted(repository: hub.Repository, quant: str) -> list[hub.HubFile]:
    """Return the files to fetch: one GGUF, or those of a checkpoint."""
    ggufs = [file for file in repository.files if file.name.endswith(".gguf")]
    top = [file for file in repository.files if "/" not in file.name]
    names = [file.name for file in top]
    if not quant and "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return [f for f in top if any(fnmatch.fnmatch(f.name, pattern) for pattern in _CHECKPOINT)]
    if quant:
        word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
        ggufs = [file for file in ggufs if word.search(file.name)]
    if len(ggufs) == 1:
        return ggufs
    known = ", ".join(file.name for file in repository.files if file.name.endswith(".gguf"))
    if not known:
        raise InputError(
            f"{repository.id} holds no safetensors checkpoint and no GGUF", "Choose another repository."
        )
    what = (
        f"no GGUF '{quant}'" if not ggufs else f"{len(ggufs)} GGUF files" + (f" '{quant}'" if quant else "")
    )
    raise InputError(
        f"{repository.id} holds {what}", f"Pick one as {repository.id}:Q4_K_M. It holds: {known}"
    )


def _fetch(
    repository: hub.Repository, files: list[hub.HubFile], final: Path, progress: Progress | None
) -> None:
    staging = room("staging", f"{slug(repository.id)}-{final.name}")
    what = f"{repository.id}@{repository.commit[:12]}"
    with full_disk_is_clear(staging, what):
        have_bytes = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
        check_room(staging, sum(file.size_bytes for file in files) - have_bytes, what)
        hub.fetch(repository.id, repository.commit, files, staging, progress)
        for file in files:
            path = staging / file.name
            if file.sha256 and sha256_file(path) != file.sha256:
                path.unlink()
                raise hub.HubError(
                    f"{what}: {file.name} arrived with wrong bytes and was removed",
                    "The same command fetches it again.",
                )
        shutil.rmtree(staging / ".cache", ignore_errors=True)  # the library's notes on its downloads
        publish(staging, final)

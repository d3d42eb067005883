"""Send a student to the Hub: only what the preview showed, and only when somebody said so.

huggingface_hub does the sending; a push that was cut off goes on with the same command, since large
files that are there already are not sent again. The token is the one of ``HF_TOKEN`` or of
``hf auth login``; it is never printed, and never part of a message.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from arte_edge.cache import is_offline
from arte_edge.errors import ArteError, InputError
from arte_edge.pii_scan import Machine, this_machine
from arte_edge.publish.preview import Preview, preview

__all__ = ["Sent", "machine_here", "refuse_findings", "send", "show"]

_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_TOKEN = re.compile(r"\bhf_\w+|(?i:bearer)\s+\S+")
_SHOWN = 12  # findings named in an error


@dataclass(frozen=True)
class Sent:
    """Where it went."""

    url: str
    commit: str


def machine_here() -> Machine:
    """Return what identifies this machine, the hosts that it reaches as devices and its token included."""
    return this_machine(_own_hosts(), filter(None, [_token()]))


def _own_hosts() -> Iterable[str]:
    """Yield what one's own devices are called and the words of their addresses (`arte-edge devices add`)."""
    from arte_edge.device.catalogue import own_folder
    from arte_edge.device.profile import read_profile

    for path in sorted(own_folder().glob("*.toml")):
        yield path.stem
        try:
            profile = read_profile(path)
        except InputError:  # `arte-edge devices check` says what is wrong with it
            continue
        if profile.remote:
            yield from (profile.remote.host, *re.split(r"[@.]", profile.remote.host))


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def show(folder: Path, repo: str, *, allow: Collection[str] = ()) -> Preview:
    """Return what a push of `folder` to `repo` would send; nothing is sent and nobody is asked.

    Raises:
        InputError: a bad name of a repository, or as `preview`.
    """
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise InputError(f"--to {repo}: not USER/REPO", "For example --to ada/home-intents-GGUF")
    return preview(folder, machine_here(), allow=allow)


def refuse_findings(found: Preview) -> None:
    """Raise if anything personal would be sent.

    Raises:
        InputError: with file and key of each thing.
    """
    if not found.findings:
        return
    told = [str(finding) for finding in found.findings[:_SHOWN]]
    if more := len(found.findings) - len(told):
        told.append(f"and {more} more")
    raise InputError(
        "Nothing was sent: personal things stand in the files:\n  " + "\n  ".join(told),
        "Remove them, or say that one may be told: --allow TEXT (never for secrets).",
    )


def send(found: Preview, repo: str, *, private: bool = False, message: str = "") -> Sent:
    """Send the files of a preview to the repository `repo`, which is made if it is not there.

    Raises:
        InputError: something personal would be sent; no token, or one without the right to write there.
        ArteError: the Hub cannot be reached or refused; the same command goes on.
    """
    from glob import escape

    refuse_findings(found)
    if is_offline():
        raise InputError("The network is switched off", "Unset ARTE_EDGE_OFFLINE and HF_HUB_OFFLINE to push.")
    if _token() is None:
        raise InputError("No token for the Hub", "Give one: hf auth login, or HF_TOKEN in the environment.")
    from huggingface_hub import HfApi

    from arte_edge.models.hub import HubError, endpoint, probe

    try:
        probe()
    except HubError as error:
        raise ArteError(
            error.message, "Check the network or HF_ENDPOINT; the same command goes on."
        ) from error
    api = HfApi(endpoint=endpoint(), library_name="arte-edge")
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=found.folder,
            allow_patterns=[escape(file.name) for file in found.files],
            commit_message=message or "Files, card and results by arte-edge",
        )
    except Exception as error:  # of huggingface_hub, httpx and the system; each told in one sentence
        raise _told(error, repo) from error
    return Sent(str(url), commit.oid)


def _told(error: BaseException, repo: str) -> ArteError:
    """Return an error that says what went wrong and holds no token."""
    status = _status(error)
    if status in (401, 403):
        return InputError(
            f"The Hub does not let this token write to {repo} ({status})",
            "Log in with one that may: hf auth login; a fine-grained token needs the right to write.",
        )
    first = _TOKEN.sub("hf_…", (str(error) or type(error).__name__).strip().splitlines()[0])
    what = f" ({status})" if status else ""
    return ArteError(
        f"The push to {repo} stopped{what}: {first}", "The same command goes on where it stopped."
    )


def _status(error: BaseException | None) -> int:
    """Return the HTTP status behind an error, 0 if there is none."""
    while error is not None:
        code = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(code, int):
            return code
        error = error.__cause__
    return 0

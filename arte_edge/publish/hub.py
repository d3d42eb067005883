"""Push a student to the Hub: a preview of what would be sent, a scan for personal data, and the upload.

Only files that belong to a student are sent: those that ``student.json`` names and the gate accepted,
and known files beside them. Other files in the folder are listed and not sent. Of a checkpoint's folder
the weights, configuration, tokenizer and card are sent. huggingface_hub does the upload; an
interrupted push resumes with the same command, since large files that are already there are not sent
again. The token is that of ``HF_TOKEN`` or of ``hf auth login``; it is never printed and never part of
a message.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from arte_edge.cache import is_offline, sha256_file
from arte_edge.errors import ArteError, InputError, first_line
from arte_edge.files import json_loads
from arte_edge.gguf.reader import read_header
from arte_edge.model_folder import TOKENIZER_FILES, look
from arte_edge.models.artifact import checksums_of
from arte_edge.pii_scan import Finding, Machine, first_held, this_machine
from arte_edge.publish.card.card import CARD
from arte_edge.publish.card.front_matter import read_head, split_card
from arte_edge.publish.card.metadata import hub_id
from arte_edge.publish.eval_results import FOLDER as EVAL_RESULTS
from arte_edge.results.rows import BENCH_NAME
from arte_edge.results.student_json import FILE_NAME, Artifact, StudentFile, read_student

_BESIDE = (
    *(CARD, FILE_NAME, BENCH_NAME, "Modelfile"),
    *("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", ".gitattributes"),
)
_CHECKPOINT = ("config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES)
_TOKEN = re.compile(r"\bhf_\w+|(?i:bearer)\s+\S+")
_SHOWN = 12  # findings named in an error
_NO_PART = "not part of the student"
_TEXT_BYTES = 64 << 20  # a larger file is not scanned as text


@dataclass(frozen=True)
class Preview:
    """What a push would send, and what it would not."""

    folder: Path
    files: dict[str, int]  # what is sent: name in the folder and in the repository, size in bytes
    excluded: tuple[tuple[str, str], ...]  # files that are not sent, and why
    findings: tuple[Finding, ...]
    head: str  # front matter of the card

    @property
    def size_bytes(self) -> int:
        return sum(self.files.values())

    def as_dict(self, to: str, private: bool, sent: Upload | None = None) -> dict[str, Any]:
        """Return it for JSON; `sent` None: nothing left the machine."""
        return {
            "to": to,
            "private": private,
            "files": [{"file": name, "size_bytes": size} for name, size in self.files.items()],
            "size_bytes": self.size_bytes,
            "not_sent": [{"file": name, "reason": reason} for name, reason in self.excluded],
            "personal": [asdict(finding) for finding in self.findings],
            "head": self.head,
            "sent": asdict(sent) if sent else None,
        }


@dataclass(frozen=True)
class Upload:
    """Where the files are now."""

    url: str
    commit: str


def preview(folder: Path, machine: Machine, *, allow: Collection[str] = ()) -> Preview:
    """Return what a push of `folder` would send.

    Args:
        allow: texts that may be published although the privacy scan flags them.

    Raises InputError: no student, no card, a broken card, or a file that is not the one described.
    """
    student = read_student(folder)
    if student is None and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: neither an export nor a checkpoint", "Give the folder of `arte-edge export`.")
    if not (folder / CARD).is_file():
        raise InputError(f"{folder}: no {CARD}", f"Write the card first: arte-edge card {folder}")
    names, excluded = _export(folder, student) if student else _checkpoint(folder)
    files = {name: (folder / name).stat().st_size for name in sorted(names)}
    card = split_card((folder / CARD).read_bytes().decode("utf-8", errors="replace"))
    if not read_head(card):
        raise InputError(f"{CARD}: it has no front matter", f"Write it: arte-edge card {folder}")
    findings = [finding for name in files for finding in _scan(folder, name, machine, allow)]
    return Preview(folder, files, tuple(sorted(excluded)), tuple(findings), card.block)


def _export(folder: Path, student: StudentFile) -> tuple[set[str], list[tuple[str, str]]]:
    names = {name for name in _BESIDE if (folder / name).is_file()}
    names |= {sum_.file for sum_ in student.tokenizer.files if (folder / sum_.file).is_file()}
    if how := student.asking:
        names |= {name for name in (how.grammar, how.json_schema) if name and (folder / name).is_file()}
    names |= {f"{EVAL_RESULTS}/{path.name}" for path in (folder / EVAL_RESULTS).glob("*.yaml")}
    accepted = [artifact for artifact in student.artifacts if artifact.status == "ok"]
    names = names.union(*(_artifact(folder, artifact) for artifact in accepted))
    if sums := {artifact.imatrix_sha256 for artifact in accepted} - {""}:
        names |= {path.name for path in folder.glob("*imatrix*.gguf") if sha256_file(path) in sums}
    rejected = {artifact.file.rstrip("/") for artifact in student.artifacts if artifact.status != "ok"}
    reasons = (
        (name, "rejected by the gate" if PurePosixPath(name).parts[0] in rejected else _NO_PART)
        for name in _all(folder)
    )
    return names, [(name, reason) for name, reason in reasons if name not in names]


def _artifact(folder: Path, artifact: Artifact) -> set[str]:
    """Return the files of one artifact. Raises InputError: it is missing, or differs from ``student.json``."""
    path = folder / artifact.file.rstrip("/")
    if not path.exists():
        raise InputError(f"{artifact.file}: listed in {FILE_NAME}, but missing here", "Export it again.")
    if checksums_of(path).sha256 != artifact.sha256:
        raise InputError(
            f"{artifact.file}: its checksum differs from the one in {FILE_NAME}",
            f"Bring it up to date: arte-edge card {folder}; or export it again.",
        )
    if not artifact.parts:
        return {artifact.file}
    return {f"{path.name}/{part.file}" for part in artifact.parts}


def _checkpoint(folder: Path) -> tuple[set[str], list[tuple[str, str]]]:
    names = {name for name in (*_CHECKPOINT, *_BESIDE) if (folder / name).is_file()}
    names |= {path.name for path in look(folder).weights}
    return names, [(name, _NO_PART) for name in _all(folder) if name not in names]


def _all(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith((".export/", ".cache/", ".git/")):
            yield name


def _scan(folder: Path, name: str, machine: Machine, allow: Collection[str]) -> Iterator[Finding]:
    path = folder / name
    pairs: Iterator[tuple[str, str]]
    if path.suffix == ".gguf":
        metadata = read_header(path).metadata.items()
        pairs = (pair for k, v in metadata if not k.startswith("tokenizer.ggml.") for pair in _walk(v, k))
    elif path.suffix == ".safetensors":
        pairs = _walk(_safetensors_metadata(path), "__metadata__")
    elif path.stat().st_size > _TEXT_BYTES or _is_binary(path):
        if (held := first_held(path, machine.private_paths())) and held not in allow:
            yield Finding(name, "bytes", "a path", held)
        return
    else:
        pairs = _texts(path)
    is_tokenizer, is_card = path.name in TOKENIZER_FILES, path.name == CARD
    for key, text in pairs:
        yield from machine.findings(text, name, key, allow=allow, names=not is_tokenizer, mail=not is_card)


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return path.name.endswith((".onnx", ".data", ".onnx_data")) or b"\0" in file.read(4096)


def _safetensors_metadata(path: Path) -> Any:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            return json_loads(file.read(length)).get("__metadata__") if length <= _TEXT_BYTES else None
        except ValueError:
            return None


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the texts of a file with their place: the key of a JSON document, else the line."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    if path.name in TOKENIZER_FILES:
        yield "text", text
        return
    if path.suffix == ".json":
        try:
            yield from _walk(json_loads(text), "")
            return
        except ValueError:
            pass
    for number, line in enumerate(text.splitlines(), 1):
        try:
            document = json_loads(line) if path.suffix == ".jsonl" else None
        except ValueError:
            document = None
        yield from _walk(document if isinstance(document, dict) else line, str(number))


def _walk(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            inner = f"{key}.{name}".lstrip(".")
            yield from _walk(item, inner)
            yield inner, str(name)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _walk(item, f"{key}.{i}".lstrip("."))
    elif isinstance(value, str):
        yield key, value


def _own_hosts() -> Iterator[str]:
    """Yield the names of the user's own devices and the parts of their addresses (`arte-edge devices add`)."""
    from arte_edge.device.profiles import own_folder, read_profile

    for path in sorted(own_folder().glob("*.toml")):
        yield path.stem
        try:
            profile = read_profile(path)
        except InputError:  # `arte-edge devices check` reports it
            continue
        if profile.remote:
            yield profile.remote.host
            parts = re.split(r"[@.]", profile.remote.host)
            yield from (part for part in parts if not part.isdigit())  # 192 and 168 are figures of a card too


def preview_push(folder: Path, repo: str, *, allow: Collection[str] = ()) -> Preview:
    """Return what a push of `folder` to `repo` would send; nothing is sent.

    Raises InputError: a bad name of a repository, or as `preview`.
    """
    if hub_id(repo) != repo or ".." in repo or "--" in repo:
        raise InputError(f"--to {repo}: not USER/REPO", "For example --to ada/home-intents-GGUF")
    from huggingface_hub import get_token

    return preview(folder, this_machine(_own_hosts(), filter(None, [get_token()])), allow=allow)


def reject_findings(found: Preview) -> None:
    """Raise if personal data would be sent. Raises InputError: with file and key of each finding."""
    if not found.findings:
        return
    listed = list(map(str, found.findings[:_SHOWN]))
    if more := len(found.findings) - len(listed):
        listed.append(f"and {more} more")
    raise InputError(
        "Nothing was sent: the privacy scan found personal data in the files:\n  " + "\n  ".join(listed),
        "Remove it, or allow a text: --allow TEXT (not possible for secrets).",
    )


def send(found: Preview, repo: str, *, private: bool = False, message: str = "") -> Upload:
    """Upload the files of a preview to the repository `repo`, which is created if it does not exist.

    Raises:
        InputError: personal data would be sent; no token, or one without write access.
        ArteError: the Hub cannot be reached or rejected the upload; re-run the same command to resume.
    """
    from glob import escape

    from huggingface_hub import HfApi, get_token

    from arte_edge.models.hub import HubError, endpoint, probe

    reject_findings(found)
    if is_offline():
        raise InputError("The network is switched off", "Unset ARTE_EDGE_OFFLINE and HF_HUB_OFFLINE to push.")
    if get_token() is None:
        raise InputError("No token for the Hub", "Give one: hf auth login, or HF_TOKEN in the environment.")
    try:
        probe()
    except HubError as error:
        raise ArteError(error.message, "Check the network or HF_ENDPOINT, then re-run the same command.") from error
    api = HfApi(endpoint=endpoint(), library_name="arte-edge")
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=found.folder,
            allow_patterns=[escape(name) for name in found.files],
            commit_message=message or "Files, card and results by arte-edge",
        )
    except Exception as error:  # of huggingface_hub, httpx and the system
        raise _translated(error, repo) from error
    return Upload(str(url), commit.oid)


def _translated(error: BaseException, repo: str) -> ArteError:
    """Return an error that names the cause and contains no token."""
    status = 0
    cause: BaseException | None = error
    while cause is not None and not status:  # the HTTP status behind it
        code = getattr(getattr(cause, "response", None), "status_code", None)
        status, cause = code if isinstance(code, int) else 0, cause.__cause__
    if status in (401, 403):
        return InputError(
            f"This token has no write access to {repo} ({status})",
            "Log in with one that has: hf auth login; a fine-grained token needs write permission.",
        )
    first = _TOKEN.sub("hf_…", first_line(error))
    what = f" ({status})" if status else ""
    return ArteError(f"The push to {repo} stopped{what}: {first}", "Re-run the same command to resume.")

"""What a push would send, decided before anything is: the list of files, and what in them is personal.

Only files that belong to a student are sent: what ``student.json`` names and the gate accepted, and
what stands beside it under a known name. All else in the folder is told and left. Of a checkpoint's
folder the weights, configuration, tokenizer and card are sent.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from arte_edge.cache import sha256_file
from arte_edge.errors import InputError
from arte_edge.export.gguf.tensor_table import read_table
from arte_edge.models.artifact_hash import checksums_of
from arte_edge.onnx.folder import TOKENIZER_FILES
from arte_edge.pii_scan import Finding, Machine, first_held
from arte_edge.publish.card import CARD
from arte_edge.publish.eval_results import FOLDER as EVAL_RESULTS
from arte_edge.publish.front_matter import read_head, split_card
from arte_edge.publish.where import BENCH_NAME
from arte_edge.results.student_json import FILE_NAME, Artifact, StudentFile, read_student

__all__ = ["Preview", "SentFile", "preview"]

_BESIDE = (
    CARD,
    FILE_NAME,
    BENCH_NAME,
    "Modelfile",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    ".gitattributes",
)
_CHECKPOINT = ("config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES)
_TEXT_BYTES = 64 << 20  # a text that is larger is none


@dataclass(frozen=True)
class SentFile:
    """One file that would be sent."""

    name: str  # in the folder and in the repository
    size_bytes: int


@dataclass(frozen=True)
class Preview:
    """Everything that a push would do."""

    folder: Path
    files: tuple[SentFile, ...]
    kept: tuple[tuple[str, str], ...]  # files that stay here, and why
    findings: tuple[Finding, ...]
    head: str  # front matter of the card

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def preview(folder: Path, machine: Machine, *, allow: Collection[str] = ()) -> Preview:
    """Return what a push of `folder` would send.

    Args:
        allow: texts that are no secret though they look personal.

    Raises:
        InputError: no student, no card, a broken card, or a file that is not the one described.
    """
    student = read_student(folder)
    if student is None and not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: neither an export nor a checkpoint", "Give the folder of `arte-edge export`."
        )
    if not (folder / CARD).is_file():
        raise InputError(f"{folder}: no {CARD}", f"Write the card first: arte-edge card {folder}")
    names, kept = _export(folder, student) if student else _checkpoint(folder)
    files = tuple(SentFile(name, (folder / name).stat().st_size) for name in sorted(names))
    text = (folder / CARD).read_bytes().decode("utf-8", errors="replace")
    card = split_card(text)
    if not read_head(card):
        raise InputError(f"{CARD}: it has no head", f"Write it: arte-edge card {folder}")
    findings = [finding for file in files for finding in _look(folder, file.name, machine, allow)]
    return Preview(folder, files, tuple(sorted(kept)), tuple(findings), card.block)


def _export(folder: Path, student: StudentFile) -> tuple[set[str], list[tuple[str, str]]]:
    names = {name for name in _BESIDE if (folder / name).is_file()}
    names |= {sum_.file for sum_ in student.tokenizer.files if (folder / sum_.file).is_file()}
    names |= {f"{EVAL_RESULTS}/{path.name}" for path in (folder / EVAL_RESULTS).glob("*.yaml")}
    names |= _matrices(folder, student)
    kept = []
    rejected: set[str] = set()
    for artifact in student.artifacts:
        if artifact.status == "ok":
            names |= _artifact(folder, artifact)
        else:
            rejected.add(artifact.file.rstrip("/"))
    for name in _all(folder):
        if name in names:
            continue
        top = PurePosixPath(name).parts[0]
        reason = "rejected by the gate" if name in rejected or top in rejected else "not part of the student"
        kept.append((name, reason))
    return names, kept


def _artifact(folder: Path, artifact: Artifact) -> set[str]:
    """Return the files of one artifact.

    Raises:
        InputError: it is missing, or not what ``student.json`` says.
    """
    path = folder / artifact.file.rstrip("/")
    if not path.exists():
        raise InputError(f"{artifact.file}: {FILE_NAME} names it and it is not here", "Export it again.")
    if checksums_of(path).sha256 != artifact.sha256:
        raise InputError(
            f"{artifact.file}: its sum is not the one in {FILE_NAME}",
            f"Bring it up to date: arte-edge card {folder}; or export it again.",
        )
    if not artifact.parts:
        return {artifact.file}
    return {f"{path.name}/{part.file}" for part in artifact.parts}


def _matrices(folder: Path, student: StudentFile) -> set[str]:
    """Return the importance matrix that accepted files were made with."""
    sums = {artifact.imatrix_sha256 for artifact in student.artifacts if artifact.status == "ok"} - {""}
    return {path.name for path in folder.glob("*imatrix*.gguf") if sums and sha256_file(path) in sums}


def _checkpoint(folder: Path) -> tuple[set[str], list[tuple[str, str]]]:
    names = {name for name in (*_CHECKPOINT, *_BESIDE) if (folder / name).is_file()}
    names |= {path.name for path in folder.glob("*.safetensors")}
    if not any(name.endswith(".safetensors") for name in names):
        raise InputError(f"{folder}: no safetensors weights", "Give a checkpoint or an export.")
    return names, [(name, "not part of the student") for name in _all(folder) if name not in names]


def _all(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith((".export/", ".cache/", ".git/")):
            yield name


def _look(folder: Path, name: str, machine: Machine, allow: Collection[str]) -> Iterator[Finding]:
    path = folder / name
    base = PurePosixPath(name).name
    if base.endswith(".gguf"):
        pairs = _gguf_texts(path)
    elif base.endswith(".safetensors"):
        pairs = _safetensors_texts(path)
    elif path.stat().st_size > _TEXT_BYTES or _is_binary(path):
        if (held := first_held(path, machine.private_paths())) and held not in allow:
            yield Finding(name, "bytes", "a path", held)
        return
    else:
        pairs = _texts(path)
    words = base not in TOKENIZER_FILES
    for key, text in pairs:
        yield from machine.findings(text, name, key, allow=allow, words=words, mail=base != CARD)


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return path.name.endswith((".onnx", ".data", ".onnx_data")) or b"\0" in file.read(4096)


def _gguf_texts(path: Path) -> Iterator[tuple[str, str]]:
    for key, value in read_table(path).metadata.items():
        if not key.startswith("tokenizer.ggml."):
            yield from _walk(value, key)


def _safetensors_texts(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _TEXT_BYTES:
            return
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return
    yield from _walk(header.get("__metadata__", {}), "__metadata__")


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the texts of a file with where they stand: the key of a JSON document, else the line."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    if path.name in TOKENIZER_FILES:
        yield "text", text
        return
    if path.suffix == ".json":
        try:
            yield from _walk(json.loads(text), "")
            return
        except ValueError:
            pass
    for number, line in enumerate(text.splitlines(), 1):
        try:
            document = json.loads(line) if path.suffix == ".jsonl" else None
        except ValueError:
            document = None
        if isinstance(document, dict):
            yield from _walk(document, str(number))
        else:
            yield str(number), line


def _walk(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _walk(item, f"{key}.{name}".lstrip("."))
            yield f"{key}.{name}".lstrip("."), str(name)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _walk(item, f"{key}.{i}".lstrip("."))
    elif isinstance(value, str):
        yield key, value

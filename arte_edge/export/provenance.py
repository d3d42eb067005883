"""The lineage of a student as GGUF metadata.

Standard keys are those of ggml/docs/gguf.md (``general.base_model.*``, ``general.dataset.*``,
``general.license``); others begin with ``arte_edge.``. Files hold nothing about the machine: model paths lose
their folders, servers their address, and `private_fields` checks the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from arte_edge.gguf.reader import STRING, UINT32, Field, read_model_header
from arte_edge.results.student_json import SCHEMA_VERSION, Lineage, Parent, Student

__all__ = ["PAPER", "gguf_fields", "parent_of", "private_fields", "public_name"]

PAPER = "arXiv:2406.19227"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?(:[\w.-]+)?")


def public_name(ref: str) -> str:
    """Return a model reference without folders and server addresses."""
    if ref.startswith("openai:"):
        return ref.removeprefix("openai:").partition("@http")[0]
    looks_local = ref.startswith((".", "/", "~")) or "\\" in ref or ref.endswith(".gguf")
    if looks_local or ("/" in ref and (Path(ref).exists() or not _HUB_ID.fullmatch(ref))):
        return PurePath(ref.replace("\\", "/").rstrip("/")).name or "model"
    return ref


def parent_of(ref: str, sha256: str = "", quantization: str = "") -> Parent:
    """Return what may be published about the model `ref`; a registry entry adds its licence and checksum."""
    known = None
    if "/" not in ref:  # a path or a Hub id is not in the registry
        from arte_edge.models.registry import entries

        known = entries().get(ref)
    if known is None:
        return Parent(name=public_name(ref), sha256=sha256, quantization=quantization)
    return Parent(
        name=known.hub.id if known.hub else known.name,
        sha256=sha256 or known.sha256,
        quantization=quantization,
        license=known.license,
    )


def gguf_fields(student: Student, lineage: Lineage, template_sha256: str) -> dict[str, Field]:
    """Return the metadata of every GGUF of this student, apart from what runtimes need."""
    texts: dict[str, str] = {"general.name": student.name}
    numbers: dict[str, int] = {"arte_edge.schema_version": SCHEMA_VERSION}
    if lineage.base:
        numbers["general.base_model.count"] = 1
        texts |= _model("general.base_model.0", lineage.base)
        texts["general.license"] = lineage.base.license
    if lineage.data:
        numbers["general.dataset.count"] = 1
        texts["general.dataset.0.name"] = f"{lineage.task} {lineage.data.file}"
        texts["general.dataset.0.description"] = f"{lineage.data.rows} rows, sha256 {lineage.data.sha256}"
        texts["arte_edge.data.sha256"] = lineage.data.sha256
    if lineage.teacher:
        texts["arte_edge.teacher.name"] = lineage.teacher.name
        texts["arte_edge.teacher.sha256"] = lineage.teacher.sha256
    if lineage.method == "arte":
        texts["arte_edge.paper"] = PAPER
    if lineage.seed is not None:
        numbers["arte_edge.seed"] = lineage.seed
    texts |= {
        "arte_edge.source": lineage.source,
        "arte_edge.task.name": lineage.task,
        "arte_edge.task.sha256": lineage.task_sha256,
        "arte_edge.method": lineage.method,
        "arte_edge.student.sha256": student.sha256,
        "arte_edge.template.sha256": template_sha256,
    }
    fields = {key: Field(STRING, text.encode()) for key, text in texts.items() if text}
    return fields | {key: Field(UINT32, number) for key, number in numbers.items()}


def _model(prefix: str, parent: Parent) -> dict[str, str]:
    keys = {f"{prefix}.name": parent.name}
    if _HUB_ID.fullmatch(parent.name):
        repository = parent.name.partition("@")[0].partition(":")[0]
        keys[f"{prefix}.organization"] = repository.partition("/")[0]
        keys[f"{prefix}.repo_url"] = f"https://huggingface.co/{repository}"
    return keys


def private_fields(gguf: Path, private: Iterable[str]) -> list[str]:
    """Return the metadata keys of a GGUF file whose text contains one of the `private` texts.

    Raises:
        InputError: not a GGUF.
    """
    texts = [text for text in private if text]
    return [
        key
        for key, value in read_model_header(gguf).metadata.items()
        if isinstance(value, str) and any(text in value for text in texts)
    ]

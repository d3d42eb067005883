"""``student.json``: where a student comes from, which files it has, and how far each is from it.

The one document that travels with the files. Its schema is published as
``docs/student.schema.json`` and has a version; a reader refuses a version it does not
know. Results are keyed on the hash of the *tensor data*, so that rewriting a file's
metadata orphans nothing. It holds no path, and no time but that of a measurement: the same
export writes the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from arte_edge.errors import InputError
from arte_edge.export.results import Accuracy, Evaluation, Section, Speed, SpeedTest
from arte_edge.store import write_atomic

__all__ = [
    "FILE_NAME",
    "SCHEMA_VERSION",
    "Accuracy",
    "Artifact",
    "Check",
    "Data",
    "Evaluation",
    "Fidelity",
    "Figures",
    "FileSum",
    "Lineage",
    "Merge",
    "Parent",
    "Speed",
    "SpeedTest",
    "Student",
    "StudentFile",
    "Tokenizer",
    "Tuning",
    "carry_results",
    "read_student",
    "write_student",
]

SCHEMA_VERSION = 1  # the only value that `StudentFile.schema_version` takes
FILE_NAME = "student.json"
_SHA256 = r"^[0-9a-f]{64}$"


class Parent(Section):
    """A model that this one comes from."""

    name: str = Field(description="registry name, Hub id, or the last part of a path")
    sha256: str = Field(default="", description="of the model's file, or one sum over its checkpoint")
    quantization: str = Field(default="", description="the form it was used in: Q4_K_M, BF16, …")
    license: str = Field(default="", description="SPDX id, or the name its author gives")


class Data(Section):
    """The rows a student learned from."""

    file: str = Field(description="name of the file, without its folder")
    rows: int = Field(ge=0)
    sha256: str = Field(pattern=_SHA256)


class Tuning(Section):
    """How the student was trained; only what a run folder records."""

    method: str = Field(description="full or lora")
    data: str = Field(default="", description="whose data: arte, original-teacher, question-only, …")
    learning_rate: float | None = None
    epochs: float | None = None


class Merge(Section):
    """How far base plus adapter is from the merged weights, in logits."""

    adapter_sha256: str = Field(pattern=_SHA256)
    max_abs_diff: float
    mean_abs_diff: float
    update_mean_abs: float = Field(description="how far the adapter moves the base: what there was to lose")
    top1_agreement: float = Field(ge=0, le=1)
    tokens: int = Field(ge=1)


class Lineage(Section):
    """Where the student comes from."""

    source: Literal["run", "checkpoint", "adapter", "gguf"] = Field(description="what was exported")
    base: Parent | None = Field(default=None, description="the student before it was tuned")
    teacher: Parent | None = None
    task: str = Field(default="", description="what it was tuned for")
    task_sha256: str = ""
    method: str = Field(default="", description="arte: the method of arXiv:2406.19227")
    seed: int | None = None
    tuning: Tuning | None = None
    data: Data | None = None
    merge: Merge | None = None


class Student(Section):
    """The 16-bit model that every file is compared with."""

    name: str
    sha256: str = Field(pattern=_SHA256, description="one sum over weights, configuration and tokenizer")
    architecture: str = Field(description="model_type of its config.json")
    dtype: str = Field(description="type of its weights: F16, BF16, F32")
    parameter_count: int = Field(ge=1)


class FileSum(Section):
    """One file and its sum."""

    file: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=_SHA256)


class Tokenizer(Section):
    """The tokenizer's files, byte for byte those of the base."""

    files: tuple[FileSum, ...] = ()
    chat_template_sha256: str = Field(default="", description="of the template's text; empty: it has none")


class Check(Section):
    """One check of the gate."""

    name: str
    measured: float | None = Field(description="null: not a number, see the note")
    threshold: float | None = Field(description="null: told, not gated")
    bound: Literal["at most", "at least"] = "at most"
    passed: bool
    note: str = ""


class Figures(Section):
    """Next-token distributions of file and student on the same tokens. Divergence in nats a token."""

    n_prompts: int = Field(ge=1)
    n_tokens: int = Field(ge=1)
    kl_mean: float | None = Field(description="mean KL(student, file); null: not finite")
    kl_p99: float | None
    kl_max: float | None
    top1: float = Field(ge=0, le=1, description="share of positions with the same most likely token")
    perplexity_reference: float | None
    perplexity_ratio: float | None = Field(description="of the file over that of the student")
    perplexity_ratio_error: float | None = Field(description="standard error of its logarithm")


class Fidelity(Section):
    """The gate's verdict on one file against the 16-bit student."""

    passed: bool
    prompts_from: str = Field(default="", description="which held-out prompts were compared")
    runtime: str = Field(default="", description="what ran the file")
    reference_runtime: str = Field(default="", description="what ran the student")
    figures: Figures | None = Field(default=None, description="null: the file did not open")
    checks: tuple[Check, ...] = ()


class Artifact(Section):
    """One exported file, or folder of files."""

    file: str = Field(description="name beside student.json; a folder ends in /")
    format: Literal["gguf", "onnx-genai", "onnx-optimum"]
    quantization: str = Field(description="Q4_K_M, F16, int4, …")
    arch: str = Field(default="", description="processor it is made for, where that matters")
    status: Literal["ok", "rejected"]
    reason: str = Field(default="", description="why it was rejected")
    size_bytes: int = Field(ge=1)
    sha256: str = Field(pattern=_SHA256, description="of the file; of a folder, one sum over its files")
    tensor_sha256: str = Field(pattern=_SHA256, description="of the tensor data alone")
    parts: tuple[FileSum, ...] = Field(default=(), description="the files of a folder")
    bits_per_weight: float = Field(gt=0, description="bits of tensor data over parameters, as it really is")
    tensor_types: dict[str, int] = Field(default={}, description="how many tensors have which type")
    imatrix_sha256: str = Field(default="", description="importance matrix used; empty: none")
    notes: tuple[str, ...] = Field(default=(), description="what is not as the format's name suggests")
    fidelity: Fidelity
    accuracy: Accuracy | None = Field(default=None, description="the gate's, where the file was made")
    speeds: tuple[Speed, ...] = ()
    evaluations: tuple[Evaluation, ...] = Field(default=(), description="measured on devices")


class StudentFile(Section):
    """The whole of ``student.json``."""

    schema_version: Literal[1] = 1
    arte_edge_version: str
    student: Student
    lineage: Lineage
    tokenizer: Tokenizer = Tokenizer()
    student_accuracy: Accuracy | None = Field(default=None, description="the 16-bit student's own")
    student_evaluations: tuple[Evaluation, ...] = Field(default=(), description="its own, on devices")
    artifacts: tuple[Artifact, ...] = ()


def write_student(folder: Path, student: StudentFile) -> Path:
    """Write ``student.json`` into `folder`, all of it or nothing.

    Raises:
        ArteError: the disk is full.
    """
    path = folder / FILE_NAME
    document: dict[str, Any] = student.model_dump(mode="json", exclude_none=False)
    write_atomic(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def read_student(folder: Path) -> StudentFile | None:
    """Return the ``student.json`` of `folder`, None if there is none.

    Raises:
        InputError: it is damaged, or of a version that this arte-edge does not know.
    """
    path = folder / FILE_NAME
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON", "Remove it and export again.") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version is {version}, this arte-edge knows {SCHEMA_VERSION}",
            "Export with the arte-edge that wrote it, or choose another -o.",
        )
    try:
        return StudentFile.model_validate(document)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise InputError(
            f"{path}: {key}: {error.errors()[0]['msg']}", "Remove it and export again."
        ) from error


def carry_results(folder: Path, new: StudentFile) -> StudentFile:
    """Return `new` with what was measured on the same tensors, as the ``student.json`` in `folder` has it.

    A file that is made again is the same file to its results. A damaged document has none.
    """
    try:
        old = read_student(folder)
    except InputError:
        return new
    if old is None:
        return new
    known = {artifact.tensor_sha256: artifact for artifact in old.artifacts}
    artifacts = []
    for artifact in new.artifacts:
        if (was := known.get(artifact.tensor_sha256)) is not None:
            found = {"speeds": was.speeds, "evaluations": was.evaluations}
            artifact = artifact.model_copy(
                update={k: v for k, v in found.items() if not getattr(artifact, k)}
            )
        artifacts.append(artifact)
    update: dict[str, Any] = {"artifacts": tuple(artifacts)}
    if old.student.sha256 == new.student.sha256:
        update["student_evaluations"] = old.student_evaluations
    return new.model_copy(update=update)

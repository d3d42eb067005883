"""``student.json``: lineage of a student, its exported files, and what was measured of each.

The one document that travels with the files. Its schema is published as ``docs/student.schema.json``
and has a version; documents of version 1 are upgraded when they are read, unknown versions are an
error. Results are keyed on the hash of the *tensor data*, so that rewriting a file's metadata keeps
them. It holds no path, and no time except that of a measurement: the same export writes the same bytes.

A speed entry is one file on one device with one runtime and number of threads. It holds every test
that was run there, and a summary of them, taken from valid tests where there are any, else from tests
on a throttled device or beside other work, and marked so.

`find_run` and `find_export` find a run or an export by name or path, both with `find_folder`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from arte_edge.cache import write_atomic
from arte_edge.errors import InputError, reading
from arte_edge.files import run_file, user_path
from arte_edge.results.accuracy import SCHEMA_VERSION, DeviceAccuracy, PairedAccuracy, Record
from arte_edge.results.comparison import ComparisonRow
from arte_edge.results.rows import BENCH_NAME, Row, Status, disturbance, read_rows

FILE_NAME = "student.json"
_SHA256 = r"^[0-9a-f]{64}$"


class Parent(Record):
    """A model in the lineage: the base or the teacher."""

    name: str = Field(description="registry name, Hub id, or the last part of a path")
    sha256: str = Field(default="", description="of the model's file, or one hash over its checkpoint")
    quantization: str = Field(default="", description="quantization it was used in: Q4_K_M, BF16, …")
    license: str = Field(default="", description="SPDX id, or the name its author gives")


class Data(Record):
    """The rows a student learned from."""

    file: str = Field(description="name of the file, without its folder")
    rows: int = Field(ge=0)
    sha256: str = Field(pattern=_SHA256)


class Tuning(Record):
    """How the student was trained; only what a run folder records."""

    method: str = Field(description="full or lora")
    data: str = Field(default="", description="origin of the data: arte, original-teacher, question-only, …")
    learning_rate: float | None = None
    epochs: float | None = None


class Merge(Record):
    """How far base plus adapter is from the merged weights, in logits."""

    adapter_sha256: str = Field(pattern=_SHA256)
    max_abs_diff: float
    mean_abs_diff: float
    update_mean_abs: float = Field(description="mean absolute change of the logits by the adapter")
    top1_agreement: float = Field(ge=0, le=1)
    tokens: int = Field(ge=1)


class Alignment(Record):
    """What aligning the teacher did to it: docs/runs.md says how each figure is measured."""

    pairs: int = Field(ge=1, description="preference pairs trained on")
    kl_nats_per_token: float = Field(description="from the original to the aligned teacher, held-out prompts")
    held_out_pairs: int = Field(ge=0)
    held_out_right: int = Field(ge=0, description="held-out pairs whose chosen text gained more")
    held_out_margin: float = Field(description="mean reward margin of the held-out pairs")
    drafts: int | None = Field(default=None, description="new prompts that both teachers answered")
    drafts_changed: int | None = None
    valid_before: float | None = None
    valid_after: float | None = None
    tokens_before: float | None = None
    tokens_after: float | None = None
    score_gain: float | None = Field(default=None, description="of the student's score of new drafts, paired")
    score_gain_low: float | None = Field(default=None, description="95 % interval, over prompts")
    score_gain_high: float | None = None

    @classmethod
    def of(cls, summary: dict[str, Any]) -> Alignment | None:
        """Return the record of a run's stage, None for an older one, which measured none of it."""
        if "kl" not in summary:
            return None
        held_out, fresh = summary["held_out"], summary.get("fresh", {})
        renamed = {"drafts": "prompts", "drafts_changed": "changed"}
        renamed |= {f"score_{name}": name for name in ("gain", "gain_low", "gain_high")}
        same = ("valid_before", "valid_after", "tokens_before", "tokens_after")
        return cls(
            pairs=summary["pairs"],
            kl_nats_per_token=summary["kl"],
            **{f"held_out_{key}": held_out[key] for key in ("pairs", "right", "margin")},
            **{key: fresh.get(renamed.get(key, key)) for key in (*renamed, *same)},
        )


class Lineage(Record):
    """Where the student comes from."""

    source: Literal["run", "checkpoint", "adapter", "gguf"] = Field(description="what was exported")
    base: Parent | None = Field(default=None, description="the student before it was tuned")
    teacher: Parent | None = None
    task: str = Field(default="", description="what it was tuned for")
    task_sha256: str = ""
    method: str = Field(default="", description="arte: the method of arXiv:2406.19227; else the origin of a run's data")
    seed: int | None = None
    alignment: Alignment | None = Field(default=None, description="null: not aligned, or not measured")
    tuning: Tuning | None = None
    data: Data | None = None
    merge: Merge | None = None

    @property
    def is_arte(self) -> bool:
        """Whether the whole method made it. Older documents call every run arte, whatever data it was tuned on."""
        return self.method == "arte" and (self.tuning is None or self.tuning.data in ("", "arte"))


class Student(Record):
    """The 16-bit model that every file is compared with."""

    name: str
    sha256: str = Field(pattern=_SHA256, description="one hash over weights, configuration and tokenizer")
    architecture: str = Field(description="model_type of its config.json")
    dtype: str = Field(description="type of its weights: F16, BF16, F32")
    parameter_count: int = Field(ge=1)


class FileSum(Record):
    """One file and its checksum."""

    file: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=_SHA256)


class Tokenizer(Record):
    """The tokenizer's files, the same bytes as those of the base."""

    files: tuple[FileSum, ...] = ()
    chat_template_sha256: str = Field(default="", description="of the template's text; empty: it has none")


class Asking(Record):
    """How the student is asked: a bare user message, through the chat template that every file carries."""

    form: Literal["answer", "answer-first", "reasoning-first"] = Field(description="what it writes, in which order")
    instruction: str = Field(description="the default system text of its chat template")
    stops: tuple[str, ...] = Field(default=(), description="texts that end an answer, beside the end token")
    answer_tokens: int = Field(ge=1, description="the most tokens of an answer")
    choices: tuple[str, ...] = Field(default=(), description="of a closed set, every answer; empty: an open one")
    example: str = Field(default="", description="input of a seed example, which commands on the card ask")
    grammar: str = Field(default="", description="GBNF file beside this one that permits answers alone")
    json_schema: str = Field(default="", description="JSON schema beside this one of an answer")


class Check(Record):
    """One check of the gate."""

    name: str
    measured: float | None = Field(description="null: not a number, see the note")
    threshold: float | None = Field(description="null: reported only")
    bound: Literal["at most", "at least"] = "at most"
    passed: bool
    note: str = ""


class FidelityMetrics(Record):
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
    answers: FidelityMetrics | None = Field(
        default=None, description="the same where the student writes its answers, which decide if compared"
    )


class Fidelity(Record):
    """The gate's verdict on one file against the 16-bit student."""

    passed: bool
    prompts_from: str = Field(default="", description="which held-out prompts were compared")
    runtime: str = Field(default="", description="what ran the file")
    reference_runtime: str = Field(default="", description="what ran the student")
    metrics: FidelityMetrics | None = Field(default=None, description="null: the file did not open")
    checks: tuple[Check, ...] = ()


class Evaluation(DeviceAccuracy):
    """An accuracy that `arte-edge bench` measured on a device, with the file that runs there."""

    device: str = Field(description="name of the device's profile or its fingerprint")
    fingerprint: str = Field(default="", description="of the device, over what does not change between runs")
    threads: int = Field(ge=1)


class SpeedTest(Record):
    """One test of one file, as `llama-bench` names them: pp512 is prefill of 512 tokens, tg128 generation of 128."""

    test: str
    n_prompt: int = Field(ge=0)
    n_gen: int = Field(ge=0)
    status: Status = "ok"
    reason: str = Field(default="", description="why it is not ok")
    test_time: str = Field(default="", description="when it was measured, ISO 8601, UTC")
    n_samples: int = Field(default=0, ge=0, description="repetitions that count")
    tokens_per_s: float | None = Field(default=None, description="median of the repetitions")
    cv_ratio: float | None = Field(default=None, description="standard deviation over mean of them")
    sustained_tokens_per_s: float | None = Field(default=None, description="rate of the test's last third")
    load_ms: float | None = None
    ttft_ms: float | None = None
    itl_p50_ms: float | None = None
    itl_p95_ms: float | None = None
    peak_rss_bytes: int | None = None
    temperature_c_max: float | None = None
    throttled: bool | None = Field(default=None, description="null: the device does not report it")
    contended: bool | None = Field(default=None, description="other work held the cores; null: not reported")
    energy_j: float | None = Field(default=None, description="of the repetitions that count, as measured")
    energy_source: str = ""


class Speed(Record):
    """Speed of one file on one device. Written by `arte-edge bench`; empty after an export."""

    device: str = Field(description="name of the device's profile or its fingerprint")
    runtime: str = Field(description="runtime, version and build")
    threads: int = Field(ge=1)
    ttft_ms: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    itl_p50_ms: float | None = None
    itl_p95_ms: float | None = None
    peak_rss_bytes: int | None = None
    temperature_c_max: float | None = None
    throttled: bool | None = None
    contended: bool | None = None
    energy_j: float | None = None
    fingerprint: str = Field(default="", description="of the device, over what does not change between runs")
    profile: str = Field(default="", description="name of the device's profile; empty: none fits")
    cpu: str = Field(default="", description="the processor's name, as its vendor gives it")
    n_depth: int = Field(default=0, ge=0, description="tokens in the KV cache before a test begins")
    tests: tuple[SpeedTest, ...] = Field(default=(), description="the tests that the summary is taken from")

    @property
    def names(self) -> set[str]:
        """The names of the device: its profile and its fingerprint."""
        return {self.device, self.fingerprint, self.profile} - {""}

    @property
    def disturbances(self) -> list[str]:
        """What disturbed its tests, each kind once: contended, throttled."""
        return sorted({kind for one in self.tests or (self,) if (kind := disturbance(one))})

    @property
    def measured(self) -> bool:
        """Whether some rate is known; false where every test failed."""
        return self.decode_tokens_per_s is not None or self.prefill_tokens_per_s is not None

    @property
    def date(self) -> str:
        """The day of the newest test, empty if not known."""
        return max((test.test_time[:10] for test in self.tests), default="")


class Artifact(Record):
    """One exported file, or folder of files."""

    file: str = Field(description="name beside student.json; a folder ends in /")
    format: Literal["gguf", "onnx-genai", "onnx-optimum"]
    quantization: str = Field(description="Q4_K_M, F16, int4, …")
    arch: str = Field(default="", description="processor it is built for, where that matters")
    status: Literal["ok", "rejected"]
    reason: str = Field(default="", description="why it was rejected")
    size_bytes: int = Field(ge=1)
    sha256: str = Field(pattern=_SHA256, description="of the file; of a folder, one hash over its files")
    tensor_sha256: str = Field(pattern=_SHA256, description="of the tensor data alone")
    parts: tuple[FileSum, ...] = Field(default=(), description="the files of a folder")
    bits_per_weight: float = Field(gt=0, description="bits of tensor data over parameters, as measured")
    tensor_types: dict[str, int] = Field(default={}, description="how many tensors have which type")
    imatrix_sha256: str = Field(default="", description="importance matrix used; empty: none")
    notes: tuple[str, ...] = Field(default=(), description="deviations from what the format's name suggests")
    fidelity: Fidelity
    accuracy: PairedAccuracy | None = Field(default=None, description="measured by the fidelity gate at export")
    speeds: tuple[Speed, ...] = ()
    evaluations: tuple[Evaluation, ...] = Field(default=(), description="measured on devices")


class StudentFile(Record):
    """The whole of ``student.json``."""

    schema_version: Literal[2] = SCHEMA_VERSION
    arte_edge_version: str
    student: Student
    lineage: Lineage
    tokenizer: Tokenizer = Tokenizer()
    asking: Asking | None = Field(default=None, description="null: not tuned for a task by arte-edge")
    student_accuracy: PairedAccuracy | None = Field(default=None, description="the 16-bit student's own")
    student_evaluations: tuple[Evaluation, ...] = Field(default=(), description="its own, on devices")
    comparison: tuple[ComparisonRow, ...] = Field(
        default=(), description="the run's closing table, with the student of the user's own labels"
    )
    artifacts: tuple[Artifact, ...] = ()


def write_student(folder: Path, student: StudentFile) -> Path:
    """Write ``student.json`` into `folder`, all of it or nothing. Raises ArteError: the disk is full."""
    path = folder / FILE_NAME
    document: dict[str, Any] = student.model_dump(mode="json", exclude_none=False)
    write_atomic(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def read_student(folder: Path) -> StudentFile | None:
    """Return the ``student.json`` of `folder`, None if there is none.

    Raises InputError: it is damaged, or of an unknown schema version.
    """
    path, again = folder / FILE_NAME, "Remove it and export again."
    try:
        with reading(path, again):
            document = json.loads(path.read_bytes())
            document = document if isinstance(document, dict) else {}
            for artifact in document.get("artifacts", ()) if document.get("schema_version") == 1 else ():
                if isinstance(fidelity := artifact.get("fidelity"), dict) and "figures" in fidelity:
                    fidelity["metrics"] = fidelity.pop("figures")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: not readable: {error.strerror}", again) from error
    outdated = "Export with the arte-edge that wrote it, or choose another -o."
    return StudentFile.parse(document, str(path), outdated=outdated, hint=again)


def carry_results(folder: Path, new: StudentFile) -> StudentFile:
    """Return `new` with the measurements in the ``student.json`` of `folder` of the same tensors.

    So a file that is exported again keeps its results. A damaged document has none.
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
            artifact = artifact.model_copy(update={k: v for k, v in found.items() if not getattr(artifact, k)})
        artifacts.append(artifact)
    update: dict[str, Any] = {"artifacts": tuple(artifacts)}
    if old.student.sha256 == new.student.sha256:
        update["student_evaluations"] = old.student_evaluations
    return new.model_copy(update=update)


# A folder that `bench`, `ask` or `export` can use although it is neither a run nor an export.
MODEL_MARKS = ("*config.json", "*.gguf")


def find_folder(ref: str | Path, *marks: str, runs: str | Path = "runs") -> Path:
    """Return the path `ref`, or what has that name in the folder `runs`: the first that holds one of `marks`.

    A task's folder often has the name of a run, and is none. If neither holds one, the first that exists is returned.
    """
    path = user_path(ref)
    if str(ref).startswith("."):  # ./name is a path and no name
        return path
    below = user_path(Path(runs) / ref)
    held = [one for one in (path, below) if any(any(one.glob(mark)) for mark in marks)]
    return next(iter(held), below if below.is_dir() and not path.exists() else path)


def find_run(ref: str | Path, runs: str | Path = "runs") -> Path:
    """Return the folder of a run: a path, or a name in the folder `runs`.

    Raises InputError: there is no such folder, or it holds no run.
    """
    path = find_folder(ref, "run.toml", runs=runs)
    if not path.is_dir():
        raise InputError(f"{ref}: no such folder", "Give a run's folder, or its name under runs/.")
    return run_file(path).parent


def find_export(ref: str | Path) -> Path:
    """Return the folder that holds ``student.json``: `ref` itself, its ``export``, or the only one below it.

    Raises InputError: there is none, or there are several.
    """
    path = find_folder(ref, FILE_NAME, f"*/{FILE_NAME}", "run.toml")
    if path.is_file() and path.name in (FILE_NAME, BENCH_NAME):
        return path.parent
    for folder in (path, path / "export"):
        if (folder / FILE_NAME).is_file():
            return folder
    below = sorted(path.glob(f"*/{FILE_NAME}"))
    if len(below) == 1:
        return below[0].parent
    if below:
        names = ", ".join(found.parent.name for found in below)
        raise InputError(f"{path}: several exports: {names}", "Name one of them.")
    raise InputError(f"{ref}: no {FILE_NAME} here", "Make files first: arte-edge export RUN.")


def read_export(folder: Path) -> StudentFile:
    """Return ``student.json`` of `folder`. Raises InputError: it is missing, damaged, or of another version."""
    if (student := read_student(folder)) is None:
        raise InputError(f"{folder}: no {FILE_NAME} here", "Make files first: arte-edge export RUN.")
    return student


def read_bench(folder: Path) -> list[Row]:
    """Return the rows of ``bench.jsonl`` in `folder`; none if nothing was measured yet.

    Raises InputError: the rows are of another version.
    """
    return read_rows(folder / BENCH_NAME)

"""One export from beginning to end.

    source ─► (merge LoRA) ─► F16 GGUF ─► importance matrix ─► files ─► verify ─► names, student.json

Every step is cached under the hash of its inputs: running the same command again resumes, and asking
for other formats makes only those. A file that fails verification is named ``*.rejected`` and a format
that cannot be made is reported; neither stops the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from arte_edge import __version__
from arte_edge.cache import Progress, sha256_checkpoint, sha256_file
from arte_edge.checkpoint import parameter_count, read_config, shapes_of, weights_dtype
from arte_edge.console import Reporter
from arte_edge.errors import ArteError, InputError
from arte_edge.export.build import Builder, uses_base
from arte_edge.export.build_cache import Made, Workshop, remove
from arte_edge.export.lora_merge import merge
from arte_edge.export.ollama import modelfile
from arte_edge.export.provenance import gguf_keys, leaks
from arte_edge.export.recipe import Recipe
from arte_edge.export.source import Source
from arte_edge.export.verification import Judge, reference_accuracy
from arte_edge.models.formats import FULL_WIDTH, Format, predicted_bytes
from arte_edge.onnx.folder import TOKENIZER_FILES
from arte_edge.pii_scan import this_machine
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.student_json import (
    Artifact,
    FileSum,
    Merge,
    Student,
    StudentFile,
    Tokenizer,
    carry_results,
    read_student,
    write_student,
)
from arte_edge.store import write_atomic

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "FOLDER",
    "MODELFILE",
    "Failure",
    "Outcome",
    "check_room",
    "describe",
    "export",
    "kept_artifacts",
    "write_modelfile",
    "write_tokenizer",
]


def describe(source: Source) -> Student:
    """Return what identifies the 16-bit student of a source, whose adapter is merged by now.

    Raises:
        InputError: its checkpoint cannot be read.
    """
    return Student(
        name=source.name,
        sha256=sha256_checkpoint(source.checkpoint),
        architecture=str(read_config(source.checkpoint).get("model_type", "")),
        dtype=weights_dtype(source.checkpoint),
        parameter_count=parameter_count(source.checkpoint),
    )


def kept_artifacts(out: Path, student: Student, force: bool) -> tuple[Artifact, ...]:
    """Return what earlier exports of this student made in `out` and is still there.

    With `force` another student's files are removed.

    Raises:
        InputError: `out` holds another student's files and `force` is not given.
    """
    try:
        there = read_student(out)
    except InputError:
        if not force:
            raise
        there = None
    if there is None:
        return ()
    if there.student.sha256 == student.sha256:
        return tuple(artifact for artifact in there.artifacts if (out / artifact.file.rstrip("/")).exists())
    if not force:
        raise InputError(
            f"{out}: holds the files of another student ({there.student.name})",
            "Choose another -o, or give --force to replace them.",
        )
    for artifact in there.artifacts:
        remove(out / Path(artifact.file).name)
    return ()


def check_room(
    shop: Workshop, checkpoint: Path, student: Student, formats: Sequence[Format], recipe: Recipe
) -> None:
    """Raise before an hour's work if what is still to be made cannot fit on the disk.

    Raises:
        ArteError: it cannot.
    """
    shapes = shapes_of(checkpoint)
    missing = {format for format in formats if not _is_there(shop, format.file_name(student.name))}
    base = Format("gguf", recipe.gguf.base)
    if any(uses_base(format, base.type) for format in missing):
        missing.add(base)
    shop.require_room(sum(predicted_bytes(format, shapes) for format in missing))


def _is_there(shop: Workshop, name: str) -> bool:
    places = (shop.pending(name), shop.final(name, accepted=True), shop.final(name, accepted=False))
    return any(place.exists() for place in places)


FOLDER = "tokenizer"
MODELFILE = "Modelfile"


def write_tokenizer(out: Path, checkpoint: Path, template_sha256: str) -> Tokenizer:
    """Copy the checkpoint's tokenizer files to ``out/tokenizer``, each whole or not at all.

    Files that an earlier export left there and the checkpoint does not have are removed.
    """
    names = [name for name in TOKENIZER_FILES if (checkpoint / name).is_file()]
    for name in names:
        write_atomic(out / FOLDER / name, (checkpoint / name).read_bytes())
    for name in set(TOKENIZER_FILES) - set(names):
        (out / FOLDER / name).unlink(missing_ok=True)
    sums = (
        FileSum(
            file=f"{FOLDER}/{name}",
            size_bytes=(out / FOLDER / name).stat().st_size,
            sha256=sha256_file(out / FOLDER / name),
        )
        for name in names
    )
    return Tokenizer(files=tuple(sums), chat_template_sha256=template_sha256)


def write_modelfile(out: Path, ggufs: list[str], source: Source) -> Path | None:
    """Write the Modelfile for accepted GGUF files, of which the first is used; none: no Modelfile.

    A tailored student answers greedily, as it was measured.

    Raises:
        InputError: its template or system message cannot be quoted.
    """
    path = out / MODELFILE
    if not ggufs:
        path.unlink(missing_ok=True)
        return None
    sampling = {"temperature": 0.0} if source.asking else None
    text = modelfile(ggufs, source.chat, asking=source.asking, plain=source.plain, sampling=sampling)
    write_atomic(path, text.encode())
    return path


_MERGED = "merged"
_MERGE_PROMPTS = 8  # enough tokens to see a lost adapter in


@dataclass(frozen=True)
class Failure:
    """A format that could not be made, which is not the gate's verdict."""

    format: Format
    error: ArteError


@dataclass(frozen=True)
class Outcome:
    """What an export made. `artifacts` are those that were asked for, in order."""

    student: StudentFile
    artifacts: tuple[Artifact, ...]
    failures: tuple[Failure, ...] = ()

    folder: Path = Path()

    @property
    def table(self) -> Table:
        """The files: size, divergence from the student, accuracy, verdict."""
        from arte_edge.export.table import artifact_table

        return artifact_table(self.artifacts, self.student.student.name)

    def _repr_html_(self) -> str:
        from arte_edge.export.table import summary_lines
        from arte_edge.notebook import fragment

        return fragment(self.student.student.name, [self.table], summary_lines(self, self.folder))

    @property
    def rejected(self) -> tuple[Artifact, ...]:
        return tuple(artifact for artifact in self.artifacts if artifact.status == "rejected")


@dataclass
class _Work:
    """What the steps of one export share."""

    shop: Workshop
    source: Source
    recipe: Recipe
    formats: tuple[Format, ...]
    reporter: Reporter
    failures: list[Failure] = field(default_factory=list)


def export(
    source: Source,
    formats: tuple[Format, ...],
    recipe: Recipe,
    out: Path,
    reporter: Reporter,
    *,
    llama_cpp: Path | None = None,
    force: bool = False,
) -> Outcome:
    """Make `formats` of `source` in the folder `out`, each judged against the 16-bit student.

    Args:
        llama_cpp: a checkout of llama.cpp whose converter is used in place of ours.
        force: replace another student's files that lie in `out`.

    Raises:
        InputError: nothing to make, or `out` holds another student's files.
        ArteError: the disk is full, or a package is missing for everything that was asked for.
    """
    if not formats:
        raise InputError("No format to export to", "Give --gguf, --onnx or a --recipe that names some.")
    for format in formats:
        recipe.verify.limits(format)  # a format that nothing could judge is refused before any work
    with Workshop(out) as shop:
        for note in source.notes:
            reporter.warn(escape(note))
        work = _Work(shop, source, recipe, formats, reporter)
        merged = _merge(work) if source.adapter else None
        if merged:
            lineage = source.lineage.model_copy(update={"merge": merged})
            work.source = replace(source, checkpoint=out / _MERGED, lineage=lineage)
        student = describe(work.source)
        before = kept_artifacts(out, student, force)
        check_room(shop, work.source.checkpoint, student, formats, recipe)
        made, imatrix = _make(work, student, llama_cpp)
        judged, own = _judge(work, student, made, imatrix)
        document = _tell(work, student, judged, own, before)
        shop.close(keep_base=bool(work.failures))
    return Outcome(document, tuple(judged.values()), tuple(work.failures), out)


def _merge(work: _Work) -> Merge:
    """Fold the adapter in, unless an earlier start did; return what the check of its logits found."""
    adapter = work.source.adapter
    assert adapter is not None
    target = work.shop.out / _MERGED
    inputs = [__version__, adapter.sha256, sha256_checkpoint(work.source.checkpoint)]
    known = work.shop.recall("merge", inputs)
    if known and target.is_dir() and sha256_checkpoint(target) == known["checkpoint"]:
        found = Merge.model_validate(known["merge"])
        work.reporter.done("merge", _say_merge(found), None)
        return found
    with work.reporter.stage("merge") as clock:
        found = merge(adapter, work.source.checkpoint, target, work.source.prompts[:_MERGE_PROMPTS])
    summary = {"checkpoint": sha256_checkpoint(target), "merge": found.model_dump(mode="json")}
    work.shop.note("merge", inputs, summary)
    work.reporter.done("merge", _say_merge(found), clock())
    return found


def _say_merge(found: Merge) -> str:
    return (
        f"adapter folded into 16 bits; logits differ by {found.mean_abs_diff:.2g} in the mean, the adapter "
        f"moves them by {found.update_mean_abs:.2g}; same first choice at {found.top1_agreement:.1%}"
    )


def _make(work: _Work, student: Student, llama_cpp: Path | None) -> tuple[dict[Format, Made], str]:
    """Make every format; return those that could be made, and the sum of the importance matrix."""
    keys = gguf_keys(student, work.source.lineage, work.source.chat.template_sha256)
    builder = Builder(work.shop, work.source, student, work.recipe, keys, work.formats, llama_cpp)
    made: dict[Format, Made] = {}
    private = this_machine().private_paths(work.source.checkpoint.absolute(), work.shop.out.absolute())
    if any(format.family == "gguf" for format in work.formats):
        with _progress(work.reporter, "importance matrix") as builder.progress:
            began = time.monotonic()
            matrix = builder.collect()
        if matrix:
            n = len(work.source.training)
            seconds = None if builder.imatrix_kept else time.monotonic() - began
            work.reporter.done("imatrix", f"{n} {work.source.training_from}", seconds)
    for format in work.formats:
        try:
            with work.reporter.stage(f"make {format.label}") as clock:
                found = builder.make(format)
            if format.family == "gguf" and (keys_found := leaks(found.path, private)):
                raise ArteError(
                    f"{format.label}: {keys_found[0]} names a path of this machine", "Please report this."
                )
        except ArteError as error:
            work.failures.append(Failure(format, error))
            work.reporter.warn(escape(f"{format.label} could not be made: {error.message}"))
            continue
        made[format] = found
        work.reporter.done("make", f"{found.path.name}", None if found.was_kept else clock())
    return made, sha256_file(builder.imatrix) if builder.imatrix else ""


def _judge(
    work: _Work, student: Student, made: dict[Format, Made], imatrix: str
) -> tuple[dict[Format, Artifact], PairedAccuracy | None]:
    """Judge what was made and give each file its name; return the artifacts, and the student's own accuracy."""
    judge = Judge(work.shop, work.source, student, work.recipe)
    judged: dict[Format, Artifact] = {}
    own: PairedAccuracy | None = None
    try:
        for format, found in made.items():
            try:
                with _progress(work.reporter, f"verifying {format.label}") as judge.progress:
                    began = time.monotonic()
                    verdict = judge.judge(format, found)
            except ArteError as error:
                work.failures.append(Failure(format, error))
                work.reporter.warn(escape(f"{format.label} could not be verified: {error.message}"))
                continue
            own = own or reference_accuracy(verdict)
            artifact = judge.artifact(format, found, verdict, imatrix)
            work.shop.place(found.path, format.file_name(student.name), accepted=artifact.status == "ok")
            judged[format] = artifact
            work.reporter.event(
                "artifact", file=artifact.file, status=artifact.status, reason=artifact.reason
            )
            seconds = None if judge.was_kept else time.monotonic() - began
            work.reporter.done("verify", f"{artifact.file}: {artifact.status}", seconds)
    finally:
        judge.close()
    return judged, own


def _tell(
    work: _Work,
    student: Student,
    judged: dict[Format, Artifact],
    own: PairedAccuracy | None,
    before: tuple[Artifact, ...],
) -> StudentFile:
    """Write what lies beside the files, and ``student.json`` last."""
    out, source = work.shop.out, work.source
    new = {_slot(artifact) for artifact in judged.values()}
    kept = [artifact for artifact in before if _slot(artifact) not in new]
    artifacts = (*judged.values(), *kept)
    ggufs = [a for a in artifacts if a.format == "gguf" and a.status == "ok"]
    # A device wants a quantized file; of those the first that was asked for.
    names = [a.file for a in sorted(ggufs, key=lambda a: a.quantization in FULL_WIDTH)]
    try:
        write_modelfile(out, names, source)
    except InputError as error:  # a template with three quotes in it is no reason to lose the files
        remove(out / MODELFILE)
        work.reporter.warn(escape(error.message))
    document = StudentFile(
        arte_edge_version=__version__,
        student=student,
        lineage=source.lineage,
        tokenizer=write_tokenizer(out, source.checkpoint, source.chat.template_sha256),
        student_accuracy=own,
        artifacts=artifacts,
    )
    document = carry_results(out, document)
    write_student(out, document)
    return document


def _slot(artifact: Artifact) -> str:
    """Return the name that a file has or would have if it had passed: one format has one file."""
    return artifact.file.rstrip("/").removesuffix(".rejected")


@contextmanager
def _progress(reporter: Reporter, what: str) -> Iterator[Progress]:
    """Show the progress of one step, whose parts each count from 0 again."""
    with reporter.percent(what) as step:
        shown: Callable[[int, int], None] = step

        def report(part: str, done: int, total: int) -> None:
            shown(done, total)

        yield report

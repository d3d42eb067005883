"""One export, from the source to ``student.json``.

    source ─► (merge LoRA) ─► F16 GGUF, held ─► importance matrix ─► build ─► verify ─► rename, student.json

The limits of a quantized type leave room for its rounding, in which a missing or swapped tensor of a lightly tuned
model would hide. So the F16 file that others are quantized from is made first, whether it was asked for or not, and
has to be the student by its own limits.

Every step is cached under the hash of its inputs: running the same command again resumes, and an export
of other formats builds only those. A file that fails verification is named ``*.rejected``, a format that
cannot be built is reported; neither stops the others.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge import __version__
from arte_edge.asking.grammar import gbnf, json_schema
from arte_edge.cache import Progress, check_free_space, sha256_checkpoint, sha256_file, write_atomic
from arte_edge.checkpoint import dtype_and_count, read_config, shapes_of
from arte_edge.console import Reporter
from arte_edge.distill.train.lora_merge import merge
from arte_edge.errors import ArteError, GateError, InputError
from arte_edge.export.build import REJECTED, BuildCache, Builder, BuiltFile, remove, uses_base
from arte_edge.export.chat import modelfile
from arte_edge.export.outcome import Failure, Outcome
from arte_edge.export.recipe import Recipe
from arte_edge.export.source import Source, gguf_fields
from arte_edge.gguf.reader import FULL_WIDTH, read_model_header
from arte_edge.models.artifact import Format, predicted_bytes
from arte_edge.onnx.build import copy_tokenizer
from arte_edge.results.accuracy import SCHEMA_VERSION, PairedAccuracy
from arte_edge.results.student_json import (
    Artifact,
    Asking,
    Check,
    Fidelity,
    FidelityMetrics,
    FileSum,
    Merge,
    Student,
    StudentFile,
    Tokenizer,
    carry_results,
    read_student,
    write_student,
)
from arte_edge.runtimes.loader import open_model
from arte_edge.verify.check import Thresholds

if TYPE_CHECKING:
    from arte_edge.runtimes.protocol import Runtime
    from arte_edge.verify.gate import Verdict

MERGED = "merged"
MODELFILE, GRAMMAR, JSON_SCHEMA = "Modelfile", "answer.gbnf", "answer.schema.json"
_AS_EXAMPLE = re.compile(r"[^`<>\x00-\x1f]{1,300}")  # a line that the card can show in a block of code
_MERGE_PROMPTS = 8  # enough tokens to notice an adapter that was lost
_HELD_PROMPTS = 8  # enough for a tensor that is missing or swapped: that shows at most tokens


@dataclass
class _Export:
    """What the steps of one export share."""

    cache: BuildCache
    source: Source
    student: Student
    recipe: Recipe
    formats: tuple[Format, ...]
    reporter: Reporter
    reference: _Reference
    failures: list[Failure] = field(default_factory=list)

    def fail(self, format: Format, verb: str, error: ArteError) -> None:
        self.failures.append(Failure(format, error))
        self.reporter.warn(f"{format.label} could not be {verb}: {error.message}")


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
    """Export `formats` of `source` to the folder `out`, each file verified against the 16-bit student.

    Args:
        llama_cpp: convert with this checkout of llama.cpp instead of our converter.
        force: replace another student's files in `out`.

    Raises:
        InputError: no format, or `out` holds another student's files.
        ArteError: the disk is full, or a package is missing for every format.
    """
    if not formats:
        raise InputError("No format to export to", "Give --gguf, --onnx or a --recipe that names some.")
    for format in formats:
        recipe.verify.limits(format)  # fail now if there are no thresholds for a format
    with BuildCache(out) as cache:
        for note in source.notes:
            reporter.warn(note)
        if source.adapter:
            source = _merge(source, cache, reporter)
        student = _describe(source)
        earlier = _earlier_artifacts(out, student, force)
        with _Reference(source.checkpoint) as reference:
            job = _Export(cache, source, student, recipe, formats, reporter, reference)
            _require_space(job)
            fields = gguf_fields(student, source.lineage, source.chat.template_sha256)
            builder = Builder(cache, source, student, recipe, fields, formats, llama_cpp)
            artifacts = _hold(job, builder)
            built, imatrix_sha256 = _build(job, builder)
            artifacts |= _verify(job, built, imatrix_sha256)
        shown = tuple(artifacts[format] for format in dict.fromkeys((*formats, *artifacts)) if format in artifacts)
        document = _write_documents(job, shown, earlier)
        cache.close(keep_base=bool(job.failures))
    return Outcome(document, shown, tuple(job.failures), out)


def _merge(source: Source, cache: BuildCache, reporter: Reporter) -> Source:
    """Merge the adapter, unless an earlier process did; return the merged source."""
    adapter, target = source.adapter, cache.out / MERGED
    assert adapter is not None
    inputs = [__version__, *adapter.files_sha256, sha256_checkpoint(source.checkpoint)]
    cached = cache.find_result("merge", inputs)
    if cached and target.is_dir() and sha256_checkpoint(target) == cached["checkpoint"]:
        result, seconds = Merge.model_validate(cached["merge"]), None
    else:
        with reporter.stage("merge") as clock:
            result = merge(adapter, source.checkpoint, target, source.prompts[:_MERGE_PROMPTS])
        seconds = clock()
        summary = {"checkpoint": sha256_checkpoint(target), "merge": result.model_dump(mode="json")}
        cache.record_result("merge", inputs, summary)
    text = (
        f"adapter merged in 16 bits; mean difference of logits {result.mean_abs_diff:.2g}, mean change by the "
        f"adapter {result.update_mean_abs:.2g}; same most likely token at {result.top1_agreement:.1%}"
    )
    reporter.done("merge", text, seconds)
    lineage = source.lineage.model_copy(update={"merge": result})
    return replace(source, checkpoint=target, lineage=lineage)


def _describe(source: Source) -> Student:
    """Return what identifies the 16-bit student."""
    dtype, count = dtype_and_count(source.checkpoint)
    return Student(
        name=source.name,
        sha256=sha256_checkpoint(source.checkpoint),
        architecture=str(read_config(source.checkpoint).get("model_type", "")),
        dtype=dtype,
        parameter_count=count,
    )


def _earlier_artifacts(out: Path, student: Student, force: bool) -> tuple[Artifact, ...]:
    """Return the artifacts of earlier exports of this student whose files still exist in `out`.

    With `force` another student's files are removed.
    """
    try:
        earlier = read_student(out)
    except InputError:
        if not force:
            raise
        return ()
    if earlier is None:
        return ()
    if earlier.student.sha256 == student.sha256:
        return tuple(a for a in earlier.artifacts if (out / a.file.rstrip("/")).exists())
    if not force:
        raise InputError(
            f"{out}: holds the files of another student ({earlier.student.name})",
            "Choose another -o, or give --force to replace them.",
        )
    for artifact in earlier.artifacts:
        remove(out / Path(artifact.file).name)
    return ()


def _require_space(job: _Export) -> None:
    """Raise `DiskFull` if the files that have to be built do not fit on the disk."""
    cache, shapes = job.cache, shapes_of(job.source.checkpoint)
    missing = {
        format
        for format in job.formats
        if not any(place.exists() for place in cache.places(format.file_name(job.student.name)))
    }
    base = Format("gguf", job.recipe.gguf.base)
    if any(uses_base(format, base.type) for format in missing):
        missing.add(base)
    need_bytes = sum(predicted_bytes(format, shapes) for format in missing)
    check_free_space(cache.out, need_bytes, "these formats")


def _hold(job: _Export, builder: Builder) -> dict[Format, Artifact]:
    """Make the full-width GGUF that other files are made from and hold it to the student.

    If it is rejected, what would be made from it fails. Returns its artifact if it was asked for or is rejected.
    """
    base = Format("gguf", job.recipe.gguf.base)
    users = [format for format in job.formats if uses_base(format, base.type)]
    if not users:
        return {}
    asked, began = base in users, time.monotonic()
    task, limits = job.source.task, job.recipe.verify.limits(base)
    inputs = [builder.inputs(base), task.sha256 if task else "", job.source.n_prompt, limits.model_dump()]
    if not asked and (job.cache.find_result("hold", inputs) or {}).get("passed"):
        return {}
    try:
        with job.reporter.stage(f"make {base.label}"):
            file = builder.build(base) if asked else builder.base()
        with _progress(job.reporter, f"verifying {base.label}") as progress:
            verdict, cached = _verdict(job, base, file, progress, asked)
        seconds = None if cached else time.monotonic() - began
    except ArteError as error:
        _drop(job, builder, users, error)
        return {}
    if not asked and verdict["passed"]:
        job.cache.record_result("hold", inputs, {"passed": True})
        job.reporter.done("hold", f"{file.path.name}, from which the others are made: ok", seconds)
        return {}
    job.formats = builder.formats = tuple(format for format in job.formats if format != base)
    if not verdict["passed"]:
        what = f"{base.file_name(job.student.name)}, from which it would be made, is rejected"
        _drop(job, builder, [f for f in users if f != base], GateError(what, "See the reasons above."))
    return {base: _placed(job, base, file, verdict, "", seconds)}


def _drop(job: _Export, builder: Builder, formats: Sequence[Format], error: ArteError) -> None:
    for format in formats:
        job.fail(format, "built", error)
    job.formats = builder.formats = tuple(format for format in job.formats if format not in formats)


def _beside_origin(job: _Export, format: Format, file: BuiltFile, found: Verdict) -> dict[str, Any]:
    """Return a verdict for JSON; that on the full-width file of a GGUF has a comparison with the GGUF itself.

    Its checkpoint was made from that by the libraries that the file is made with, so an error there shows here only.
    """
    gguf, checks = job.source.gguf, list(found.checks)
    if gguf is not None and format == Format("gguf", job.recipe.gguf.base) and found.fidelity is not None:
        from arte_edge.gguf.to_hf import unpacked_limits
        from arte_edge.verify.logits import fidelity_checks, measure_fidelity

        kl_mean, top1 = unpacked_limits(read_model_header(gguf))
        with closing(open_model(gguf)) as origin, closing(open_model(file.path)) as opened:
            distance = measure_fidelity(origin, opened, job.source.prompts[:_HELD_PROMPTS])
        compared = fidelity_checks(distance, Thresholds(kl_mean=kl_mean, top1=top1))
        checks += [replace(check, name=f"{check.name} to the source file") for check in compared]
    found = replace(found, checks=tuple(checks), passed=all(check.passed for check in checks))
    return found.as_dict() | {"reason": found.reason}


def _build(job: _Export, builder: Builder) -> tuple[dict[Format, BuiltFile], str]:
    """Build every format; return those that succeeded, and the sha256 of the importance matrix."""
    source, reporter = job.source, job.reporter
    if any(format.family == "gguf" for format in job.formats):
        began = time.monotonic()
        if builder.uses_imatrix:
            job.reference.release()  # collecting loads the student too
        with _progress(reporter, "importance matrix") as progress:
            builder.collect_imatrix(progress)
        if builder.imatrix:
            seconds = None if builder.imatrix_cached else time.monotonic() - began
            reporter.done("imatrix", f"{len(source.training)} {source.training_from}", seconds)
    built: dict[Format, BuiltFile] = {}
    for format in job.formats:
        try:
            with reporter.stage(f"make {format.label}") as clock:
                file = builder.build(format)
        except ArteError as error:
            job.fail(format, "built", error)
            continue
        built[format] = file
        reporter.done("make", file.path.name, None if file.cached else clock())
    return built, sha256_file(builder.imatrix) if builder.imatrix else ""


def _verify(job: _Export, built: dict[Format, BuiltFile], imatrix_sha256: str) -> dict[Format, Artifact]:
    """Verify each file and rename it; return the artifacts.

    The student is opened when the first file needs it and stays open: its answers serve all.
    """
    artifacts: dict[Format, Artifact] = {}
    for format, file in built.items():
        began = time.monotonic()
        try:
            with _progress(job.reporter, f"verifying {format.label}") as progress:
                verdict, cached = _verdict(job, format, file, progress)
        except ArteError as error:
            job.fail(format, "verified", error)
            continue
        seconds = None if cached else time.monotonic() - began
        artifacts[format] = _placed(job, format, file, verdict, imatrix_sha256, seconds)
    return artifacts


def _placed(
    job: _Export,
    format: Format,
    file: BuiltFile,
    verdict: Mapping[str, Any],
    imatrix_sha256: str,
    seconds: float | None,
) -> Artifact:
    """Rename a verified file by its verdict, report it and return its artifact."""
    artifact = _artifact(job, format, file, verdict, imatrix_sha256)
    job.cache.place(file.path, format.file_name(job.student.name), accepted=artifact.status == "ok")
    job.reporter.event("artifact", file=artifact.file, status=artifact.status, reason=artifact.reason)
    job.reporter.done("verify", f"{artifact.file}: {artifact.status}", seconds)
    return artifact


@dataclass
class _Reference:
    """The 16-bit student, opened on first use. It takes four bytes a parameter."""

    checkpoint: Path
    model: Runtime | None = None

    def open(self, progress: Progress) -> Runtime:
        if self.model is None:
            progress("opening the student", 0, 1)
            self.model = open_model(self.checkpoint)
        return self.model

    def release(self) -> None:
        """Close it until it is needed again."""
        if self.model is not None:
            self.model.close()
            self.model = None

    def __enter__(self) -> _Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _verdict(
    job: _Export, format: Format, file: BuiltFile, progress: Progress, whole: bool = True
) -> tuple[dict[str, Any], bool]:
    """Return the verdict on one file for JSON, and whether it was cached; if not `whole`, on a few prompts alone."""
    source, settings, limits = job.source, job.recipe.verify, job.recipe.verify.limits(format)
    if limits.stop_differences is not None:  # end tokens that the format has no place for; a note names them
        allowed = limits.stop_differences + file.summary.get("unwritten_ends", 0)
        limits = limits.model_copy(update={"stop_differences": allowed})
    task = source.task if settings.examples and whole else None
    budget = source.asking.answer_tokens if source.asking else 0
    prompts = source.prompts if whole else source.prompts[:_HELD_PROMPTS]
    inputs = [
        __version__,
        SCHEMA_VERSION,  # of the verdict, which is stored as JSON
        file.checksums.sha256,
        job.student.sha256,
        list(prompts),
        limits.model_dump(mode="json"),
        [task.sha256, settings.examples, budget] if task else None,
    ]
    step = f"{'verify' if whole else 'hold'}-{format.label}"
    if cached := job.cache.find_result(step, inputs):
        return cached, True
    from arte_edge.verify.gate import verify_file

    found = verify_file(
        job.reference.open(progress),
        file.path,
        prompts,
        limits,
        task=task,
        limit=settings.examples,
        answer_tokens=budget,
        progress=progress,
    )
    verdict = _beside_origin(job, format, file, found)
    job.cache.record_result(step, inputs, verdict)
    return verdict, False


def _artifact(
    job: _Export, format: Format, file: BuiltFile, verdict: Mapping[str, Any], imatrix_sha256: str
) -> Artifact:
    """Return the entry of ``student.json`` for a verified file."""
    source, student = job.source, job.student
    name = format.file_name(student.name) + ("" if verdict["passed"] else REJECTED)
    summary, sums, metrics = file.summary, file.checksums, verdict["fidelity"]
    reference_runtime, runtime = verdict.get("runtimes") or ("", "")
    bits = summary.get("bits_per_weight") or 8 * sums.tensor_bytes / student.parameter_count
    fidelity = Fidelity(
        passed=verdict["passed"],
        prompts_from=source.prompts_from,
        runtime=runtime,
        reference_runtime=reference_runtime,
        metrics=None if metrics is None else FidelityMetrics(**metrics),
        checks=tuple(Check(**check) for check in verdict["checks"]),
    )
    accuracy = verdict.get("accuracy")
    return Artifact(
        file=name + "/" if format.is_folder else name,
        format=format.family,
        quantization=format.type,
        arch=format.arch,
        status="ok" if verdict["passed"] else "rejected",
        reason=verdict["reason"],
        size_bytes=sums.size_bytes,
        sha256=sums.sha256,
        tensor_sha256=sums.tensor_sha256,
        parts=sums.parts,
        bits_per_weight=round(bits, 4),
        tensor_types=summary.get("tensor_types", {}),
        imatrix_sha256=imatrix_sha256 if summary.get("imatrix_used") else "",
        notes=tuple(_notes(summary)),
        fidelity=fidelity,
        accuracy=PairedAccuracy(**accuracy) if accuracy else None,
    )


def _notes(summary: Mapping[str, Any]) -> list[str]:
    """Return what a file's name does not show: tensors of another type, and warnings."""
    notes = []
    for swap, count in Counter(f.partition(": ")[2] for f in summary.get("fallbacks", ())).items():
        planned, _, actual = swap.partition(" -> ")
        place = "" if " " in planned else f" in place of {planned}"  # llama.cpp does not always name it
        tensors = "1 tensor" if count == 1 else f"{count} tensors"
        notes.append(f"{tensors} became {actual}{place}: row length is not a multiple of 256")
    return [*notes, *summary.get("warnings", ())]


def _write_documents(job: _Export, new: tuple[Artifact, ...], earlier: tuple[Artifact, ...]) -> StudentFile:
    """Write the Modelfile, the tokenizer and the grammar of answers, and ``student.json`` last."""
    out, source = job.cache.out, job.source
    names = {_accepted_name(artifact) for artifact in new}
    artifacts = (*new, *(artifact for artifact in earlier if _accepted_name(artifact) not in names))
    _write_modelfile(job, artifacts)
    document = StudentFile(
        arte_edge_version=__version__,
        student=job.student,
        lineage=source.lineage,
        tokenizer=_write_tokenizer(out, source.checkpoint, source.chat.template_sha256),
        asking=_write_asking(out, source),
        student_accuracy=next((a.accuracy.reference_alone for a in new if a.accuracy), None),
        comparison=source.comparison,
        artifacts=artifacts,
    )
    document = carry_results(out, document)
    write_student(out, document)
    return document


def _accepted_name(artifact: Artifact) -> str:
    return artifact.file.rstrip("/").removesuffix(REJECTED)


def _write_modelfile(job: _Export, artifacts: Sequence[Artifact]) -> None:
    """Write Ollama's Modelfile for the accepted GGUF files; it uses the first quantized one.

    A template that cannot be quoted in a Modelfile is a warning: the files are good without it.
    """
    path, source = job.cache.out / MODELFILE, job.source
    ggufs = [a for a in artifacts if a.format == "gguf" and a.status == "ok"]
    names = [a.file for a in sorted(ggufs, key=lambda a: a.quantization in FULL_WIDTH)]
    if not names:
        path.unlink(missing_ok=True)
        return
    try:
        write_atomic(path, modelfile(names, source.chat, source.asking).encode())
    except InputError as error:
        path.unlink(missing_ok=True)
        job.reporter.warn(error.message)


def _write_tokenizer(out: Path, checkpoint: Path, template_sha256: str) -> Tokenizer:
    """Copy the checkpoint's tokenizer files to ``out/tokenizer``; remove others that an earlier export left."""
    folder = out / "tokenizer"
    folder.mkdir(exist_ok=True)
    files = [folder / name for name in copy_tokenizer(checkpoint, folder)]
    sums = (
        FileSum(file=f"{folder.name}/{file.name}", size_bytes=file.stat().st_size, sha256=sha256_file(file))
        for file in files
    )
    return Tokenizer(files=tuple(sums), chat_template_sha256=template_sha256)


def _write_asking(out: Path, source: Source) -> Asking | None:
    """Write the grammar and the JSON schema of a student's answers where they have one; return how it is asked."""
    how = source.asking
    grammar, schema = (gbnf(how.answer, how.form), json_schema(how.answer)) if how else (None, None)
    texts = {GRAMMAR: grammar, JSON_SCHEMA: json.dumps(schema, ensure_ascii=False, indent=1) if schema else None}
    for name, text in texts.items():
        if text is None:
            (out / name).unlink(missing_ok=True)
        else:
            write_atomic(out / name, f"{text.rstrip()}\n".encode())
    if how is None or source.task is None:
        return None
    fit = (seed.input for seed in source.task.seed if _AS_EXAMPLE.fullmatch(seed.input))
    return Asking(
        form=how.form,
        instruction=how.instruction,
        stops=how.stops,
        answer_tokens=how.answer_tokens,
        choices=how.answer.options(""),
        example=min(fit, key=len, default=""),
        grammar=GRAMMAR if grammar else "",
        json_schema=JSON_SCHEMA if schema else "",
    )


@contextmanager
def _progress(reporter: Reporter, what: str) -> Iterator[Progress]:
    """Show the progress of one step, whose parts each count from 0 again."""
    with reporter.percent(what) as step:
        shown: Callable[[int, int], None] = step
        yield lambda part, done, total: shown(done, total)

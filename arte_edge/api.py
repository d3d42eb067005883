"""The command line's verbs as functions: the same names and parameters, typed results, nothing printed.

    import arte_edge as ae

    run = ae.distill(task="home_intents", teacher="qwen2.5-coder-0.5b-instruct", student="smollm2-135m-instruct")
    outcome = run.export(gguf="Q4_K_M")

Paths may be strings or `Path`. Progress goes to a `Reporter` if one is given; without one nothing is shown.
Errors are `ArteError`. A parity test holds the parameters of these functions and of the command line together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.asking.ask import Reply, Student, accepted_file, checked_question
from arte_edge.asking.serve import Server, serve_file
from arte_edge.asking.table import AnsweredTable, ask_table
from arte_edge.bench.runner import BenchOutcome, bench
from arte_edge.cache import Progress
from arte_edge.errors import InputError
from arte_edge.files import json_loads, user_path
from arte_edge.publish.recommend.pick import recommend
from arte_edge.publish.recommend.recommendation import Recommendation
from arte_edge.publish.report.page import ReportPage, report
from arte_edge.results.comparison import upgraded
from arte_edge.results.rows import SIXTEEN_BITS
from arte_edge.results.student_json import FILE_NAME, MODEL_MARKS, find_folder, find_run

if TYPE_CHECKING:
    from rich.table import Table

    from arte_edge.console import Reporter
    from arte_edge.distill.config import RunConfig
    from arte_edge.distill.study import StudyResult
    from arte_edge.export.outcome import Outcome
    from arte_edge.export.recipe import Recipe
    from arte_edge.export.source import Source
    from arte_edge.models.artifact import Format
    from arte_edge.verify.gate import Verdict

__all__ = ["AnsweredTable", "Reply", "Run", "Server", "Student", "ask", "ask_file", "bench", "distill"]
__all__ += ["export", "load_run", "open_student", "recommend", "report", "serve", "study", "verify"]

PathLike = str | Path
_DEFAULT_RECIPE = "laptop"


@dataclass(frozen=True)
class Run:
    """A run of `distill`: its folder, its settings, and what its evaluation measured."""

    folder: Path

    @cached_property
    def config(self) -> RunConfig:
        """The run's settings, as resolved."""
        from arte_edge.distill.config import build, load_toml

        return build(str(self.folder / "run.toml"), load_toml(self.folder / "run.toml"))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def evaluation(self) -> dict[str, Any]:
        """The summary of the evaluation: `rows` of accuracies with intervals, `paired` tests.

        Raises InputError: the run is not finished.
        """
        if not self.finished:
            raise InputError(f"{self.folder}: this run is not finished", "Run the same command again to resume.")
        manifest = json_loads((self.folder / "evaluate" / "manifest.json").read_bytes())
        summary: dict[str, Any] = upgraded(manifest["summary"])
        return summary

    @property
    def finished(self) -> bool:
        return (self.folder / "evaluate" / "manifest.json").is_file()

    @property
    def table(self) -> Table:
        """Accuracy by model and prompting, with 95 % intervals: a rich table, HTML in a notebook."""
        from arte_edge.distill.stages.evaluate import summary_table

        return summary_table(self.evaluation)

    @property
    def student(self) -> Path:
        """The folder of the tuned student, a 16-bit checkpoint."""
        return self.folder / "tune" / "student"

    @property
    def tuned(self) -> Path:
        """The tuned student as the evaluation opened it: its F16 file, or the checkpoint.

        Raises InputError: it is not tuned yet.
        """
        gguf, tune = self.folder / "tune" / "student-F16.gguf", self.folder / "tune" / "manifest.json"
        if not gguf.is_file() and not tune.is_file():
            raise InputError(f"{self.folder}: no tuned student yet", "Run the same `distill` command again to resume.")
        return gguf if gguf.is_file() else self.student

    def ask(self, text: str, **settings: Any) -> Reply:
        """Return the tuned student's answer to one input of its task; parameters as of `arte_edge.ask`."""
        return ask(self.folder, text, **settings)

    def export(self, **settings: Any) -> Outcome:
        """Export the student; parameters as of `arte_edge.export`."""
        return export(self.folder, **settings)

    def bench(self, **settings: Any) -> BenchOutcome:
        """Measure the exported files; parameters as of `arte_edge.bench`."""
        return bench(self.folder, **settings)

    def recommend(self, **settings: Any) -> Recommendation:
        """Choose a file for a device; parameters as of `arte_edge.recommend`."""
        return recommend(self.folder, **settings)

    def report(self, **settings: Any) -> ReportPage:
        """Write the run as one HTML page; parameters as of `arte_edge.report`."""
        return report(self.folder, **settings)

    def _repr_html_(self) -> str:
        from arte_edge.console import fragment

        if not self.finished:
            return fragment(f"{self.name}: not finished", lines=["Run the same command again to resume."])
        from arte_edge.distill.stages.evaluate import summary_lines

        return fragment(self.name, [self.table], summary_lines(self.evaluation))


def load_run(run: PathLike, *, runs: PathLike = "runs") -> Run:
    """Return the run in a folder, or the one of that name below `runs`; finished or not.

    Raises InputError: there is none.
    """
    return Run(find_run(run, runs))


def open_student(
    source: PathLike,
    *,
    task: PathLike | None = None,
    grammar: bool = True,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> Student:
    """Return a student to ask many questions, as in ``with open_student("runs/mine") as student: student.ask(…)``.

    Args:
        source: a run's folder or name, a GGUF file, an ONNX or checkpoint folder, or an export's folder, of which
            the first accepted file is opened.
        task: what a model without ``student.json`` is for.
        grammar: closed sets and numbers: permit only answers in the task's form.
        max_tokens: limit of an answer; the student's own unless given.
        threads: of the runtime.

    Raises InputError: no such run or model, its student is not tuned yet, or is one of another task.
    """
    from arte_edge.tasks.loaders import load_task

    path = find_folder(source, "run.toml", FILE_NAME, *MODEL_MARKS)
    loaded = None if task is None else load_task(str(task))
    if not path.exists() and path.suffix in (".gguf", ".onnx"):
        raise InputError(f"{path}: no such file", "Give a model's file, an export's folder, or a run.")
    if not path.exists() or (path / "run.toml").is_file():
        run = load_run(path)
        known = run.config.task
        own = load_task(known.ref, bbh=None if known.bbh is None else Path(known.bbh))
        if loaded is not None and loaded.sha256 != own.sha256:
            what = f"{run.folder}: a run of the task '{own.name}', not of '{loaded.name}'"
            raise InputError(what, "Leave out --task: the run knows its own.")
        path, loaded = run.tuned, own
    elif path.name == FILE_NAME or (path / FILE_NAME).is_file():
        path = accepted_file(path.parent if path.is_file() else path)
    return Student(path, loaded, grammar=grammar, max_tokens=max_tokens, threads=threads)


def ask(
    source: PathLike,
    text: str,
    *,
    task: PathLike | None = None,
    grammar: bool = True,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> Reply:
    """Return a student's answer to `text`. Other parameters as of `open_student`.

    Raises InputError: as `open_student`; `text` is blank, no UTF-8, or longer than the student's context;
    ArteError: the runtime is not installed, or failed.
    """
    checked_question(text)
    with open_student(source, task=task, grammar=grammar, max_tokens=max_tokens, threads=threads) as student:
        return student.ask(text)


def ask_file(
    source: PathLike,
    file: PathLike,
    out: PathLike,
    *,
    column: str | None = None,
    with_text: bool = False,
    task: PathLike | None = None,
    grammar: bool = True,
    max_tokens: int | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> AnsweredTable:
    """Ask every row of a table and write it with a column of answers. Interrupted, the same call resumes.

    Args:
        source: and the parameters from `task` on as of `open_student`.
        file: a CSV, TSV, JSONL, JSON or Parquet table.
        out: a .csv, .tsv or .jsonl file.
        column: of the questions; found by its name unless given.
        with_text: write the whole text of each answer as well.

    Raises InputError: as `open_student`; no such column, or `out` holds the answers of another table or student;
    ArteError: the runtime is not installed or failed, or the disk is full.
    """
    with open_student(source, task=task, grammar=grammar, max_tokens=max_tokens, threads=threads) as student:
        return ask_table(
            student, user_path(file), user_path(out), column=column, with_text=with_text, reporter=reporter
        )


def serve(source: PathLike, *, port: int = 8080, threads: int | None = None) -> Server:
    """Start the server of llama.cpp on 127.0.0.1 with a student's GGUF file, and wait until it answers.

    Close it, or use it in a ``with``.

    Args:
        source: a GGUF file, an export's folder, or a run's folder or name.
        port: that it listens on.

    Raises InputError: no GGUF file, or the port is in use; ArteError: no server is installed, or it failed.
    """
    return serve_file(open_student(source), port, threads)


def distill(
    run: PathLike | None = None,
    *,
    task: PathLike | None = None,
    teacher: str | None = None,
    student: str | None = None,
    bbh: PathLike | None = None,
    name: str | None = None,
    runs: PathLike = "runs",
    set: Mapping[str, Any] | Sequence[str] = (),
    until: str | None = None,
    from_: str | None = None,
    shard: str | None = None,
    ray: str | None = None,
    force: bool = False,
    update: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Distil a student: check, elicit, calibrate, prefer, align, tailor, tune, evaluate.

    Interrupted at any moment, the same call resumes.

    Args:
        run: a run.toml, a shipped preset's name, or a run's folder to resume it.
        task: a shipped name, a task folder, a labelled file, hub:org/name.
        teacher: a registry name, path, Hub id, or openai:MODEL@URL.
        student: a registry name, path or Hub id.
        bbh: folder of BIG-Bench-Hard files with the task.
        name: of the run's folder; made of task and student unless given.
        runs: where run folders are.
        set: overrides of single keys: ``{"tune.epochs": 2}`` or ``["tune.epochs=2"]``.
        until: the last stage to make; the same call without it goes on.
        from_: make this stage and those after it again, from stored calls; those before it have to be done.
        shard: ``2/4``: make only the second quarter of the first unfinished stage's calls (docs/runs.md).
        ray: run the models on a Ray cluster: local, auto or HOST:PORT; empty: without, whatever `run` says.
        force: continue even if the teacher does not significantly outperform the student.
        update: change the settings of an existing run; finished calls stay cached.

    Raises:
        InputError: a wrong key, task or model, or a folder that holds another run.
        StoppedEarly: a check or a budget ended the run; the same call resumes.
    """
    from arte_edge.console import Reporter
    from arte_edge.distill.pipeline import run_pipeline

    config, folder = plan_run(
        run, task=task, teacher=teacher, student=student, bbh=bbh, name=name, runs=runs, set=set, ray=ray
    )
    run_pipeline(
        config,
        folder,
        reporter or Reporter(None if shard else folder / "events.jsonl", quiet=True),
        force=force,
        update=update,
        until=until or "",
        from_=from_ or "",
        shard=shard or "",
    )
    return Run(folder)


def plan_run(
    run: PathLike | None = None,
    *,
    task: PathLike | None = None,
    teacher: str | None = None,
    student: str | None = None,
    bbh: PathLike | None = None,
    name: str | None = None,
    runs: PathLike = "runs",
    set: Mapping[str, Any] | Sequence[str] = (),
    ray: str | None = None,
) -> tuple[RunConfig, Path]:
    """Return the configuration and the folder of a run. Parameters as of `distill`."""
    from arte_edge import catalog
    from arte_edge.distill.config import build, load_toml, parse_set, short_name

    path = None if run is None else catalog.find("presets", str(run))
    task_keys = {
        "ref": None if task is None else str(task),
        "bbh": None if bbh is None else str(user_path(bbh).resolve()),
    }
    given: dict[str, Any] = {
        "name": name,
        "task": {key: value for key, value in task_keys.items() if value is not None} or None,
        "teacher": {"model": teacher} if teacher else None,
        "student": {"model": student} if student else None,
        "cluster": None if ray is None else {"address": ray},
    }
    flags = {key: value for key, value in given.items() if value}
    overrides = [f"{key}={_toml(value)}" for key, value in set.items()] if isinstance(set, Mapping) else list(set)
    config = build(str(run or "--set"), *([load_toml(path)] if path else []), flags, parse_set(overrides))
    if path and path != user_path(str(run)) and path.name == "run.toml":  # a folder was given
        if name or str(runs) != "runs":
            raise InputError(f"{run}: this run is resumed where it is", "Leave out --name and --runs.")
        return config, path.parent
    short = f"{Path(config.task.ref).stem}-{short_name(config.student.model)}"
    folder = config.name or (path.stem if path else short)
    return config, user_path(runs) / folder


def study(
    file: PathLike, *, runs: PathLike = "runs", update: bool = False, reporter: Reporter | None = None
) -> StudyResult:
    """Compare arms on tasks, students and seeds: one distillation each, and a table of paired differences.

    Interrupted at any moment, the same call resumes. A run that is stopped early is named in the result's `stopped`.

    Args:
        file: a STUDY.toml.
        runs: parent folder of the study's folder.
        update: change the settings of existing runs; finished calls stay cached.

    Raises InputError: a wrong key, task, model or arm; ArteError: a run failed.
    """
    from arte_edge.console import Reporter
    from arte_edge.distill.study import load_study, run_study

    path = user_path(file)
    loaded = load_study(path)
    folder = user_path(runs) / (loaded.name or path.stem)
    return run_study(loaded, folder, reporter or Reporter(quiet=True), update=update)


def _toml(value: Any) -> str:
    """Return a value as TOML: JSON is, for numbers, booleans, strings and lists of them."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def export(
    source: PathLike,
    *,
    gguf: str | Sequence[str] | None = None,
    onnx: str | Sequence[str] | None = None,
    recipe: PathLike | None = None,
    out: PathLike | None = None,
    task: PathLike | None = None,
    base: str | None = None,
    llama_cpp: PathLike | None = None,
    force: bool = False,
    offline: bool = False,
    reporter: Reporter | None = None,
) -> Outcome:
    """Export a student to GGUF and ONNX files, each verified against the 16-bit student.

    A file that fails is named ``*.rejected`` and listed in the outcome's `rejected`; nothing is raised for it.

    Args:
        source: a run's folder or name, a checkpoint or LoRA adapter folder, a Hub id, a registry name, a GGUF.
        gguf: GGUF types, as in ``"Q4_K_M,Q8_0"``.
        onnx: int4, int8, fp32, optimum-fp32, optimum-int8[-arm64|-avx2|-avx512].
        recipe: a shipped recipe or a .toml; `gguf` and `onnx` replace its formats.
        out: folder for the files; RUN/export for a run, else NAME-export.
        task: task to verify with, for a source that is not a run.
        base: an adapter's 16-bit base, in place of the one it names.
        llama_cpp: convert with this checkout of llama.cpp.
        force: replace another student's files in `out`.
        offline: use only models on this machine.

    Raises:
        InputError: no such source, unknown format, or `out` holds another student's files.
        ArteError: the disk is full, or a package is missing for every format.
    """
    from arte_edge.console import Reporter
    from arte_edge.export.pipeline import export as run_export

    opened, formats, plan, folder = plan_export(
        source, gguf=gguf, onnx=onnx, recipe=recipe, out=out, task=task, base=base, offline=offline, reporter=reporter
    )
    return run_export(
        opened,
        formats,
        plan,
        folder,
        reporter or Reporter(quiet=True),
        llama_cpp=None if llama_cpp is None else Path(llama_cpp),
        force=force,
    )


def verify(
    reference: PathLike,
    artifact: PathLike,
    *,
    task: PathLike | None = None,
    limit: int = 100,
    test: bool = False,
    prompts: PathLike | None = None,
    type: str | None = None,
    bbh: PathLike | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    reporter: Reporter | None = None,
) -> Verdict:
    """Compare a model file with the model it was made from: tokens, template, stop tokens, logits, answers.

    Args:
        reference: the model as it should be: a registry name, Hub id, checkpoint folder, GGUF or ONNX folder.
        artifact: the model to judge, named in the same ways.
        task: both answer this task's validation examples.
        limit: largest number of the task's examples; 0: all.
        test: use the task's test split. For a final evaluation only.
        prompts: compare logits on these texts: .jsonl with `prompt`, or one a line.
        type: judge by the limits of this type, as in Q4_K_M or int4; default: what the file says it is.
        bbh: folder of BIG-Bench-Hard files with the task.
        threads: of the artifact's runtime.
        progress: called with (step, done, total).

    Raises InputError: no such model or task; ArteError: a runtime is missing or failed.
    """
    from arte_edge.runtimes.loader import open_model
    from arte_edge.tasks.loaders import load_task
    from arte_edge.verify.check import thresholds_for
    from arte_edge.verify.gate import verify_file
    from arte_edge.verify.logits import prompts_for

    limits = None if type is None else thresholds_for(type)
    loaded = None if task is None else load_task(str(task), bbh=None if bbh is None else user_path(bbh))
    paths = [_model_path(str(ref), reporter) for ref in (artifact, reference)]
    if progress is not None:
        progress("opening the reference", 0, 1)
    model = open_model(paths[1], threads)
    try:
        verdict = verify_file(
            model,
            paths[0],
            prompts_for(model, loaded, None if prompts is None else user_path(prompts)),
            limits,
            task=loaded,
            limit=limit,
            final=test,
            threads=threads,
            progress=progress,
        )
        if model.quantization in (*SIXTEEN_BITS, ""):
            return verdict
        note = f"The reference is itself quantized ({model.quantization}): earlier losses do not show."
        return replace(verdict, notes=(note,))
    finally:
        model.close()


def _model_path(ref: str, reporter: Reporter | None) -> Path:
    """Return the file or folder that `ref` names, fetched from the registry or the Hub if it is not here."""
    path = user_path(ref)
    if path.exists():
        return path
    from arte_edge.models.resolve import resolve

    with downloading(ref, reporter) as progress:
        return resolve(ref, progress=progress).path


@contextmanager
def downloading(name: str, reporter: Reporter | None) -> Iterator[Progress | None]:
    """Yield the progress callback of a download: a bar where a reporter shows one, else None."""
    if reporter is None or reporter.quiet:
        yield None
        return
    from arte_edge.console import model_progress

    with model_progress(name) as progress:
        yield progress


def plan_export(
    source: PathLike,
    *,
    gguf: str | Sequence[str] | None = None,
    onnx: str | Sequence[str] | None = None,
    recipe: PathLike | None = None,
    out: PathLike | None = None,
    task: PathLike | None = None,
    base: str | None = None,
    offline: bool = False,
    reporter: Reporter | None = None,
) -> tuple[Source, tuple[Format, ...], Recipe, Path]:
    """Return what `export` would make: its source, formats, recipe and folder. Parameters as of `export`."""
    from arte_edge.export.recipe import load_recipe
    from arte_edge.export.source import open_source
    from arte_edge.models.artifact import parse_list

    plan = load_recipe(str(recipe or _DEFAULT_RECIPE))
    formats = plan.formats
    if gguf is not None or onnx is not None:
        formats = parse_list(_comma_separated(gguf), _comma_separated(onnx), plan.onnx.arch)
    if not formats:
        hint = "Name some in gguf.types or onnx.formats, or give --gguf or --onnx."
        raise InputError(f"{recipe}: names no format to export to", hint)
    ref = str(source)
    with downloading(Path(ref).name or ref, reporter) as progress:
        opened = open_source(
            ref,
            task=None if task is None else str(task),
            base=base,
            n_training=plan.gguf.imatrix_prompts,
            n_prompt=plan.verify.prompts,
            offline=offline,
            progress=progress,
        )
    if out is not None:
        folder = user_path(out)
    elif opened.lineage.source == "run":
        folder = opened.checkpoint.parents[1] / "export"  # of RUN/tune/student
    else:
        folder = Path(f"{opened.name}-export")
    return opened, formats, plan, folder


def _comma_separated(names: str | Sequence[str] | None) -> str | None:
    return names if names is None or isinstance(names, str) else ",".join(names)

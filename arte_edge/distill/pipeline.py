"""The pipeline: the six steps in order, a check before and an evaluation after them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arte_edge.console import Reporter, doing
from arte_edge.distill.aligned import write_aligned
from arte_edge.distill.config import RunConfig, build, load_toml
from arte_edge.distill.evaluation import student_prompts
from arte_edge.distill.latency import Budget, device_rates, new_budget, stored_budget
from arte_edge.distill.memory_plan import Tokens, models_of, refuse_too_large, would_fit
from arte_edge.distill.part import Part, PartDone, Share
from arte_edge.distill.run_context import RunContext, Summary, open_folder
from arte_edge.distill.validate_config import fewer_shown, refuse_models, refuse_run
from arte_edge.errors import InputError
from arte_edge.extras import need
from arte_edge.files import user_path
from arte_edge.models.resolve import quantized_student
from arte_edge.runtimes.loader import is_server
from arte_edge.tasks.loaders import load_task

if TYPE_CHECKING:
    from arte_edge.cluster.connect import RayCluster

_PROMPT_PERCENTILE = 95  # of the validation examples, rendered as for the student


@dataclass(frozen=True)
class Outcome:
    """A finished run: its folder, the evaluation's summary, and the engine calls made and reused.

    If only a part of the run was wanted, `stopped` says which is done, and there is no evaluation.
    """

    folder: Path
    evaluation: Summary
    calls_made: int
    calls_cached: int
    stopped: str = ""


def run_pipeline(
    config: RunConfig,
    folder: Path,
    reporter: Reporter,
    *,
    force: bool = False,
    update: bool = False,
    siblings: Sequence[Path] = (),
    until: str = "",
    from_: str = "",
    shard: str = "",
) -> Outcome:
    """Run every stage of `config` in `folder`; stages that are done from the same inputs are reused.

    Args:
        siblings: folders of other runs whose finished stages of the same inputs are taken over.
        until: the last stage to make.
        from_: make this stage and those after it again, from stored calls; those before it have to be done.
        shard: ``2/4``: make only the second quarter of the first unfinished stage's calls.

    Raises:
        InputError: a task, model or run folder that cannot be used, or a stage that this run does not have.
        StoppedEarly: a check or a budget ended the run; the same command resumes it.
    """
    need("train", "distilling")
    if config.aligned and config.align.weights == "nf4":
        need("qlora", 'align.weights = "nf4"')
    from arte_edge.distill.stages.align import align
    from arte_edge.distill.stages.calibrate import calibrate
    from arte_edge.distill.stages.check import check
    from arte_edge.distill.stages.elicit import elicit
    from arte_edge.distill.stages.evaluate import evaluate
    from arte_edge.distill.stages.prefer import prefer
    from arte_edge.distill.stages.target import target
    from arte_edge.distill.stages.tune import tailor_and_tune
    from arte_edge.distill.train.ranks import refuse_processes

    refuse_processes(config.train.processes, sharded=config.train.shard_teacher)
    task = load_task(config.task.ref, bbh=Path(config.task.bbh) if config.task.bbh else None)
    refuse_run(config, task)
    for ref in config.align.also:
        if not (user_path(ref) / "run.toml").is_file() or user_path(ref).resolve() == folder.resolve():
            raise InputError(
                f"align.also: {ref}: not the folder of another run", "Start that run first; it may be unfinished."
            )
    part = Part(config, until=until, from_=from_, share=Share.parse(shard) if shard else None)
    if part.share and update:
        raise InputError("--shard and --update exclude each other", "Update with the plain command first.")
    if part.share and config.cluster.address:
        raise InputError("--shard and cluster.address exclude each other", 'Leave one out: --ray "".')
    if part.share and not (folder / "run.toml").is_file():
        part.refuse_unfinished("check")
    open_folder(config, folder, task, update=update)
    run, others = RunContext(config, task, folder, reporter, siblings, part), list[RunContext]()
    try:
        run.cluster = _cluster(config, reporter)
        models = f": {config.student.model} learns from {config.teacher.model} → {folder}"
        reporter.say(models, task.name)
        _prepare(run, update=update)
        adapter = None
        check(run, force=force)
        target(run)
        if config.aligned:
            elicit(run)
            calibrate(run)
            prefer(run)
            part.enter("align", folder)
            if config.align.also and part.share:  # one process at a time works in the other folders
                raise PartDone("With align.also shards end here: run the same command without --shard.")
            for other in _other_runs(run):
                others.append(other)
                run.close_engines()  # one teacher in memory at a time
                check(other, force=force)
                target(other)
                elicit(other)
                calibrate(other)
                prefer(other)
                other.close_engines()
            _, adapter = align(run, others)
            write_aligned(folder, config.teacher.model, run.local(config.teacher))
        elif config.data == "best-of-n":
            calibrate(run)
        tuned = tailor_and_tune(run, adapter)
        evaluation = evaluate(run, tuned)
        part.leave(folder)
        return Outcome(folder, evaluation, run.calls.made, run.calls.cached)
    except PartDone as done:
        reporter.event("stopped", text=str(done))
        reporter.say(str(done))
        return Outcome(folder, {}, run.calls.made, run.calls.cached, str(done))
    finally:
        for each in (run, *others):
            each.close()
        if run.cluster is not None:
            run.cluster.close()


def _cluster(config: RunConfig, reporter: Reporter) -> RayCluster | None:
    """Return the cluster that the run's models run on, None for this machine without Ray."""
    keys = config.cluster
    if not keys.address:
        return None
    from arte_edge.cluster.connect import WorkerSizes, connect

    with doing(f"joining the Ray cluster {keys.address}"):
        sizes = WorkerSizes(keys.workers, keys.cpus_per_worker, keys.gpus_per_worker)
        cluster = connect(keys.address, sizes, reporter.warn)
    reporter.say(f" {keys.address}: {cluster.summary}", "ray")
    return cluster


def _other_runs(run: RunContext) -> Iterator[RunContext]:
    """Yield the runs of other tasks whose pairs the alignment is trained on too.

    Raises InputError: a run of another teacher or student.
    """
    for ref in run.config.align.also:
        folder, where = user_path(ref), f"align.also: {ref}"
        config = build(where, load_toml(folder / "run.toml"))
        task = load_task(config.task.ref, bbh=Path(config.task.bbh) if config.task.bbh else None)
        open_folder(config, folder, task, update=False)
        other = RunContext(config, task, folder, Reporter(folder / "events.jsonl", quiet=run.reporter.quiet))
        other.cluster = run.cluster
        if config.deploy.device:
            other.budget = decide_budget(other, update=False)
        for key in ("teacher", "student"):
            mine, theirs = (run.identity(getattr(each, key)) for each in (run.config, config))
            if mine != theirs:
                other.close()
                raise InputError(
                    f"{where}: its {key} is {getattr(config, key).model}, here it is {getattr(run.config, key).model}",
                    "Runs are aligned together if teacher and student are the same and prompted in the same way.",
                )
        run.reporter.say(f" {folder}, for its pairs", task.name)
        yield other


def _plan_memory(run: RunContext) -> None:
    """Say how much memory the run needs. Raises InputError: more than there is, whatever its texts."""
    if (models := models_of(run)) is None:
        return
    tokens = Tokens.most(run.config, run.task)
    plan = refuse_too_large(run.config, tokens, models)
    run.reporter.event("memory", **plan.as_row())
    run.reporter.say(f" {plan}", "memory")
    if not plan.fits:
        fits = would_fit(run.config, tokens, models)
        run.reporter.warn(f"{plan.most.stage} may need more than the memory; less take: {'; '.join(fits)}")
    elif plan.most.total > plan.available_bytes:
        run.reporter.warn(f"{plan.most.stage} may swap or be killed unless other programs free memory")


def _prepare(run: RunContext, *, update: bool) -> None:
    """Convert the models, decide the latency budget, make the file that scores: errors there come before any call."""
    config = run.config
    deploy, student = config.deploy, config.student
    for sentence in fewer_shown(config, run.task):
        run.reporter.warn(sentence)
    begins = not (run.folder / "check" / "manifest.json").is_file()
    if begins and run.part.is_whole:  # of stages elsewhere, or made before, nothing is needed here
        _plan_memory(run)
    if begins:
        teacher = None if is_server(config.teacher.model) else run.local(config.teacher)
        refuse_models(config, teacher, run.local(student))
        run.checkpoint(student)
        if config.aligned:
            run.checkpoint(config.teacher)
    if run.cluster is not None:
        here = [student] if config.teacher.on_server else [student, config.teacher]
        models = [run.local(each) for each in here]
        with doing("checking the nodes of the cluster"):
            run.cluster.check(run.folder / "run.toml", models, vllm=config.teacher.starts_vllm)
    if deploy.device:
        run.budget = decide_budget(run, update=update)
        rates = run.budget.rates
        run.reporter.say(
            f"{deploy.device}, {deploy.file}: {deploy.max_answer_seconds:g} s minus prefill of "
            f"{run.budget.prompt_tokens} prompt tokens at {rates.prefill_tokens_per_s:.0f}/s leaves "
            f"{run.budget.answer_tokens} tokens to answer at {rates.decode_tokens_per_s:.1f}/s "
            f"({rates.evidence}: {rates.source})"
        )
    if kind := run.config.prefer.student_file:
        with doing(f"quantizing {student.model} to {kind}"):
            quantized_student(run.local(student), kind)


def decide_budget(run: RunContext, *, update: bool) -> Budget:
    """Return the latency budget of a run with a ``[deploy]`` device, decided once."""
    config, student = run.config.deploy, run.config.student
    if not update and (stored := stored_budget(run.folder, config)) is not None:
        return stored
    rates, engine = device_rates(config, run.local(student)), run.engine(student)
    target = run.config.tune.target
    how = run.asking(None if target == "auto" else target)  # that of a trial is not known yet
    prompts = student_prompts(run, engine, how, run.task.validation)
    counts = [engine.count_tokens(prompt) for prompt in prompts]
    long_prompt = math.ceil(float(np.percentile(counts, _PROMPT_PERCENTILE)))
    budget = new_budget(run.folder, config, long_prompt, rates)
    run.reporter.event("deploy", deploy=config.model_dump(mode="json"), budget=asdict(budget))
    return budget

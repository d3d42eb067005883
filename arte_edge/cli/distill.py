"""``arte-edge distill`` and ``study``: a student for a task; arms compared on tasks, students and seeds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from arte_edge.cli import interrupt
from arte_edge.errors import InputError, StoppedEarly


def distill(
    run: Annotated[
        str | None, typer.Argument(help="A run.toml, a shipped preset's name (see `arte-edge ls`), or a run's folder.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task: a shipped name, a folder, or hub:org/name.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher: name, path, Hub id, openai:MODEL@URL, or RUN/aligned.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="Student model: name, path, or Hub id.")] = None,
    bbh: Annotated[Path | None, typer.Option(help="Folder of BIG-Bench Hard files that contains the task.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder.")] = None,
    runs: Annotated[Path, typer.Option(help="Parent folder of run folders.")] = Path("runs"),
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override one key, such as align.learning_rate=1e-6.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Stop after this stage; the same command without it continues.")
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STAGE",
            help="Make this stage and those after it again, from stored calls; those before it have to be done.",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Make only this share of the first unfinished stage's calls, beside the other N - 1 commands.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="local|auto|HOST:PORT", help="Run the models on a Ray cluster: cluster.address."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate calls, tokens and cost of every stage, and stop.")
    ] = False,
    prices: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPT,COMPLETION", help="With --dry-run: dollars per million tokens of a teacher behind a server."
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="NxKIND", help="With --dry-run: hours and memory on such GPUs, as 8xA100-80GB."),
    ] = None,
    gpu_price: Annotated[
        float | None, typer.Option(metavar="USD", help="With --gpus: dollars that one of them costs for an hour.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Continue even if the teacher does not significantly outperform the student."),
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Change the settings of an existing run; finished calls are reused.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON lines on stdout.")] = False,
) -> None:
    """Distil a student for a task, from a run file or flags.

    Stages: check, elicit, calibrate, prefer, align, tailor, tune, evaluate. The run can be stopped at any
    moment: re-run the same command to resume. llama.cpp uses ARTE_EDGE_THREADS threads (OMP_NUM_THREADS has no
    effect on it), else every core.
    """
    from arte_edge import api

    config, folder = api.plan_run(
        run, task=task, teacher=teacher, student=student, bbh=bbh, name=name, runs=runs, set=set_ or [], ray=ray
    )
    if prices and not dry_run:
        raise InputError("--prices needs --dry-run", "A run itself counts calls and tokens, not dollars.")
    if (gpus and not dry_run) or (gpu_price is not None and not gpus):
        raise InputError("--gpus needs --dry-run, and --gpu-price needs --gpus", "A run uses what is there.")
    if dry_run:
        from arte_edge.distill import estimate
        from arte_edge.distill.gpu_plan import Gpus

        os.environ.setdefault("ARTE_EDGE_PROBE", "0")  # an estimate measures no batch sizes
        estimate.dry_run(
            config,
            prices=estimate.parse_prices(prices) if prices else None,
            gpus=Gpus.parse(gpus, gpu_price) if gpus else None,
            as_json=as_json,
        )
        return
    from arte_edge.console import Reporter, emit_json, out
    from arte_edge.distill.pipeline import run_pipeline
    from arte_edge.distill.stages.evaluate import show_summary

    interrupt.resumes()
    reporter = Reporter(None if shard else folder / "events.jsonl", as_json=as_json)
    done = run_pipeline(
        config, folder, reporter, force=force, update=update, until=until or "", from_=from_ or "", shard=shard or ""
    )
    calls = (done.calls_made, done.calls_cached)
    if as_json:
        counts = {"calls_made": calls[0], "calls_kept": calls[1]}
        emit_json({"event": "done", "run": str(folder), "stopped": done.stopped, **counts, **done.evaluation})
    elif not done.stopped:
        show_summary(out, done.evaluation, folder, calls)


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="Tasks, students, seeds and arms.")],
    runs: Annotated[Path, typer.Option(help="Parent folder of the study's folder.")] = Path("runs"),
    update: Annotated[
        bool, typer.Option("--update", help="Change the settings of existing runs; finished calls are reused.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line for each run that ends, and the table, as JSON.")
    ] = False,
) -> None:
    """Compare arms, one run each, on tasks, students and seeds.

    The runs share their calls; nothing is generated twice. Re-run the same command to resume. The study's folder holds
    study.json, study.html and the run folders.
    """
    from arte_edge import api
    from arte_edge.console import Reporter, emit_json, out

    interrupt.resumes()
    done = api.study(file, runs=runs, update=update, reporter=Reporter(as_json=as_json))
    if as_json:
        emit_json({"event": "done", "study": str(done.folder), **done.as_dict()})
    else:
        for title, table in done.tables:
            out.print(title, style="bold", markup=False, soft_wrap=True)
            out.print(table)
        for line in [*done.lines, f"Folder: {done.folder}"]:
            out.print(line, markup=False, soft_wrap=True)
    if done.stopped:
        raise StoppedEarly(f"{len(done.stopped)} of {len(done.runs)} runs stopped early", "The table is without them.")

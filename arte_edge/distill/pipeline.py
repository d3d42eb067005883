"""The pipeline: the six steps in order, between a check before and an evaluation after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arte_edge.console import Reporter, emit_json, out
from arte_edge.distill.calibrate import calibrate
from arte_edge.distill.check import check
from arte_edge.distill.closing import show_closing
from arte_edge.distill.config import RunConfig
from arte_edge.distill.deploy import DeviceSide, settle
from arte_edge.distill.elicit import elicit
from arte_edge.distill.evaluate import evaluate
from arte_edge.distill.prefer import prefer
from arte_edge.distill.run import Run, open_folder
from arte_edge.distill.student_file import quantized_file
from arte_edge.distill.tailor import tailor
from arte_edge.extras import need
from arte_edge.runtimes.completion import Engine
from arte_edge.tasks.loaders import load_task

__all__ = ["run_pipeline"]


def run_pipeline(
    config: RunConfig,
    folder: Path,
    *,
    anyway: bool,
    update: bool,
    as_json: bool,
    device_side: DeviceSide | None = None,
) -> None:
    """Run every stage of `config` in `folder`; stages that are done from the same inputs are kept.

    `device_side` is what ``[deploy]`` and ``prefer.student_file`` ask of later rooms.

    Raises:
        InputError: a task, model or run folder that cannot be used.
        StoppedEarly: a check or a budget ended the run; the same command goes on.
    """
    need("train", "distilling")
    from arte_edge.distill.align import align, refuse_server
    from arte_edge.distill.tune import tune

    refuse_server(config)
    task = load_task(config.task.ref, bbh=Path(config.task.bbh) if config.task.bbh else None)
    open_folder(config, folder, task, update=update)
    reporter = Reporter(folder / "events.jsonl", as_json=as_json)
    run = Run(config, task, folder, reporter)
    try:
        reporter.say(
            f"[bold]{task.name}[/]: {config.student.model} learns from {config.teacher.model} → {folder}"
        )
        _prepare(run, device_side, update)
        adapter = None
        check(run, anyway=anyway)
        if config.aligned:
            elicit(run)
            calibrate(run)
            prefer(run)
            _, adapter = align(run)
        tailor(run, lambda: _writer(run, adapter), adapter[1] if adapter else "")
        _, tuned = tune(run)
        evaluation = evaluate(run, tuned)
        _close(run, evaluation, as_json)
    finally:
        run.close()


def _prepare(run: Run, device_side: DeviceSide | None, update: bool) -> None:
    """Fix the budget, and make the file that scores: what cannot be had is said before anything is paid for."""
    run.budget = settle(run, device_side, update=update)
    if (budget := run.budget) is not None:
        deploy = run.config.deploy
        run.reporter.say(
            f"{deploy.device}, {deploy.file}: {deploy.max_answer_seconds:g} s less {budget.prompt_tokens} prompt "
            f"tokens at {budget.rates.prefill_tokens_per_s:.0f}/s leave {budget.answer_tokens} tokens to answer "
            f"at {budget.rates.decode_tokens_per_s:.1f}/s ({budget.rates.evidence})"
        )
    run.quantize = device_side.quantize if device_side else None
    if kind := run.config.prefer.student_file:
        quantized_file(run.local(run.config.student), kind, run.quantize)


def _writer(run: Run, adapter: tuple[Path, str] | None) -> Engine:
    """Return the teacher that writes the training data: aligned, or as it is."""
    if adapter is None:
        return run.engine(run.config.teacher)
    return run.engine_with(run.local(run.config.teacher), adapter, run.config.teacher)


def _close(run: Run, evaluation: dict[str, Any], as_json: bool) -> None:
    calls = (run.calls.made, run.calls.kept)
    if as_json:
        emit_json(
            {
                "event": "done",
                "run": str(run.folder),
                "calls_made": calls[0],
                "calls_kept": calls[1],
                **evaluation,
            }
        )
    else:
        show_closing(out, evaluation, run.folder, calls)

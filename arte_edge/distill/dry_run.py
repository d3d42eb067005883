"""``arte-edge distill --dry-run``: what a run would take, before it takes it.

Both models are opened and asked a few questions (`probe`); the rest is arithmetic
(`plan`). The run folder is neither read nor written: the figures are those of a run
from its beginning.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich import box
from rich.table import Table

from arte_edge.console import Reporter, emit_json, err, out
from arte_edge.distill.config import RunConfig
from arte_edge.distill.plan import Measured, Sizes, StagePlan, plan, works
from arte_edge.distill.probe import measure
from arte_edge.distill.run import Run
from arte_edge.errors import InputError
from arte_edge.extras import need
from arte_edge.gguf.reader import read_model_header
from arte_edge.models.local import LocalModel
from arte_edge.runtimes.openai.client import Prices
from arte_edge.tasks.loaders import load_task

__all__ = ["dry_run", "parse_prices"]

_PARAMETER_BYTES = 2  # of a checkpoint's weights: nearly all are 16-bit


def dry_run(config: RunConfig, *, prices: Prices | None = None, as_json: bool = False) -> None:
    """Print the plan of a run: a line a stage, on stdout.

    Raises:
        InputError: a task or model that cannot be used, or prices for a teacher that runs here.
        EngineError: a model does not answer.
    """
    need("train", "a dry run")
    from arte_edge.distill.align import refuse_server

    task = load_task(config.task.ref, bbh=Path(config.task.bbh) if config.task.bbh else None)
    with TemporaryDirectory(prefix="arte-edge-") as folder:
        run = Run(config, task, Path(folder), Reporter(quiet=True))
        try:
            refuse_server(config)
            if prices and not run.teacher_is_server:
                raise InputError(f"--prices: {config.teacher.model} runs here and costs nothing")
            if not as_json:
                err.print("Asking teacher and student a few questions …")
            sizes = _sizes(run)
            measured = measure(run, {work.kind for work in works(config, sizes, 1.0)})
        finally:
            run.close()
    lines = plan(config, sizes, measured, prices)
    notes = _notes(config, sizes, measured, prices)
    if as_json:
        emit_json(_document(lines, measured, notes, priced=prices is not None))
        return
    out.print(_table(lines, priced=prices is not None))
    for note in notes:
        out.print(note, markup=False, soft_wrap=True)


def parse_prices(text: str) -> Prices:
    """Read ``0.15,0.60``: dollars for a million prompt tokens and a million completion tokens.

    Raises:
        InputError: not two numbers of 0 or more.
    """
    try:
        prompt, completion = (float(part) for part in text.split(","))
    except ValueError:
        prompt = completion = -1.0
    if not (0 <= prompt < float("inf") and 0 <= completion < float("inf")):
        raise InputError(
            f"--prices {text}: not two prices", "Dollars for a million tokens: --prices 0.15,0.60"
        )
    return Prices(prompt, completion)


def _sizes(run: Run) -> Sizes:
    server = run.teacher_is_server
    return Sizes(
        n_validation=len(run.task.validation),
        n_test=len(run.task.test_keys()),
        n_techniques=len(run.task.techniques),
        closed=run.task.answer.closed,
        server=server,
        teacher_parameters=0 if server else _parameters(run.local(run.config.teacher)),
        student_parameters=_parameters(run.local(run.config.student)),
    )


def _parameters(model: LocalModel) -> int:
    if model.gguf is not None:
        return read_model_header(model.gguf).parameter_count
    weights = model.checkpoint().glob("*.safetensors")
    return sum(path.stat().st_size for path in weights) // _PARAMETER_BYTES


def _notes(config: RunConfig, sizes: Sizes, measured: Measured, prices: Prices | None) -> list[str]:
    teacher, student = measured.speeds["teacher"], measured.speeds["student"]
    trained = "align and tune" if config.aligned else "tune"
    notes = [
        f"Measured: the teacher reads {teacher.read:.0f} and writes {teacher.write:.0f} tokens/s, the student "
        f"{student.read:.0f} and {student.write:.0f}; {measured.drafts_per_prompt:.1f} valid questions a prompt.",
        "A run writes more texts together than this probe, and is then faster; drafts that are refused or "
        "relabelled away, and a machine with other work, make it slower.",
        f"The training in {trained} is rough: a rule of thumb from two CPU cores, scaled by the number of weights.",
    ]
    if config.calibrate.models and config.aligned:
        notes.append("The further models of calibrate are counted as if each were the teacher.")
    if sizes.server and prices is None:
        notes.append("Cost: give --prices PROMPT,COMPLETION, dollars for a million tokens.")
    return notes


def _table(lines: list[StagePlan], *, priced: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    for name in ("calls", "prompt tokens", "written", "minutes", *(["USD"] if priced else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*_cells(line, priced=priced))
    table.add_section()
    table.add_row(*_cells(_total(lines), priced=priced), style="bold")
    return table


def _cells(line: StagePlan, *, priced: bool) -> list[str]:
    cells = [
        line.stage,
        f"{line.calls:,}",
        f"{line.prompt_tokens:,.0f}",
        f"{line.completion_tokens:,.0f}",
        f"{line.minutes:,.1f}{' rough' if line.training_minutes else ''}",
    ]
    return [*cells, f"{line.cost_usd:,.2f}"] if priced else cells


def _total(lines: list[StagePlan]) -> StagePlan:
    keys = ("calls", "prompt_tokens", "completion_tokens", "engine_minutes", "training_minutes", "cost_usd")
    return StagePlan("total", **{key: sum(getattr(line, key) for line in lines) for key in keys})


def _document(
    lines: list[StagePlan], measured: Measured, notes: list[str], *, priced: bool
) -> dict[str, Any]:
    return {
        "event": "plan",
        "stages": [_row(line, priced=priced) for line in lines],
        "total": _row(_total(lines), priced=priced),
        "speeds_tokens_per_s": {who: asdict(speed) for who, speed in measured.speeds.items()},
        "drafts_per_prompt": measured.drafts_per_prompt,
        "notes": notes,
    }


def _row(line: StagePlan, *, priced: bool) -> dict[str, Any]:
    return {
        "stage": line.stage,
        "calls": line.calls,
        "prompt_tokens": round(line.prompt_tokens),
        "completion_tokens": round(line.completion_tokens),
        "minutes": round(line.minutes, 2),
        "training_minutes_rough": round(line.training_minutes, 2),
        "cost_usd": round(line.cost_usd, 4) if priced else None,
    }

"""``arte-edge verify``: is this file still that model? A table of checks, and 3 if one fails."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arte_edge.console import emit_json, err, out
from arte_edge.errors import GateError

if TYPE_CHECKING:
    from arte_edge.tasks.task import Task
    from arte_edge.verify.check import Check
    from arte_edge.verify.gate import Verdict
    from arte_edge.verify.logits import Progress
    from arte_edge.verify.opened import Opened

__all__ = ["verify"]

_MODEL = "A name of 'models ls', a Hub id, a checkpoint folder, a .gguf file, or a folder with an ONNX model."
_SHORT = 64  # characters of a note that stand in the table, on two lines
_SIXTEEN_BITS = ("F32", "F16", "BF16", "fp32", "fp16", "")


def verify(
    reference: Annotated[str, typer.Argument(metavar="A", help=f"The model as it should be. {_MODEL}")],
    artifact: Annotated[str, typer.Argument(metavar="B", help="The model to judge, named in the same ways.")],
    task: Annotated[
        str | None, typer.Option(help="Let both answer this task's validation examples (see `tasks ls`).")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Examples of the task; 0: all of them.")] = 100,
    test: Annotated[
        bool, typer.Option("--test", help="Use the task's test split. For a final evaluation only.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Compare logits on these texts: .jsonl with `prompt`, or one a line."),
    ] = None,
    type_: Annotated[
        str | None, typer.Option("--type", help="Judge B by the limits of this type, as in Q4_K_M or int4.")
    ] = None,
    bbh: Annotated[Path | None, typer.Option(help="Folder of BIG-Bench-Hard files with the task.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of B's runtime.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare model B with model A: tokens, chat template, stop tokens, logits, and a task's answers.

    Ends with 3 if B is not A within the limits of its quantization type.
    """
    from arte_edge.tasks.loaders import load_task
    from arte_edge.verify.gate import verify_file
    from arte_edge.verify.opened import open_model
    from arte_edge.verify.thresholds import thresholds_for

    limits = None if type_ is None else thresholds_for(type_)
    loaded = None if task is None else load_task(task, bbh=bbh)
    artifact_path, reference_path = _find(artifact), _find(reference)
    with _progress() as progress:
        progress("opening A", 0, 1)
        model = open_model(reference_path, threads)
        try:
            if model.quantization not in _SIXTEEN_BITS:
                err.print(
                    f"A is itself quantized ({model.quantization}): what B lost before A was made does not show.",
                    markup=False,
                    soft_wrap=True,
                )
            verdict = verify_file(
                model,
                artifact_path,
                _texts(model, loaded, prompts),
                limits,
                task=loaded,
                limit=limit,
                final=test,
                threads=threads,
                progress=progress,
            )
        finally:
            model.close()
    if as_json:
        emit_json(verdict.as_dict() | {"reason": verdict.reason})
    else:
        _print(verdict, type_ or verdict.judged_as)
    if not verdict.passed:
        names = ", ".join(check.name for check in verdict.failed)
        raise GateError(f"{verdict.artifact} is not {verdict.reference}: {names}")


def _find(ref: str) -> Path:
    """Return the file or folder that `ref` names; the registry and the Hub are asked for what is not here."""
    path = Path(ref).expanduser()
    if path.exists():
        return path
    from arte_edge.console import model_progress
    from arte_edge.models import resolve

    with model_progress(ref) as progress:
        model = resolve(ref, progress=progress)
    found = model.gguf or model.folder
    assert found is not None  # a LocalModel has one of the two
    return found


def _texts(model: Opened, task: Task | None, prompts: Path | None) -> list[str]:
    from arte_edge.verify.prompts import built_in_prompts, prompts_from_file, task_prompts

    if prompts is not None:
        return prompts_from_file(prompts)
    if task is not None:
        return task_prompts(model, task)
    return built_in_prompts(model)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Yield a callback that says on stderr what is being done: in place on a terminal, a line a step elsewhere."""
    if err.is_terminal:
        with err.status("") as status:
            yield lambda step, done, total: status.update(f"{step} {done}/{total}" if total > 1 else step)
        return
    said = ""

    def line(step: str, done: int, total: int) -> None:
        nonlocal said
        if step != said:
            said = step
            err.print(step, markup=False, soft_wrap=True)

    yield line


def _print(verdict: Verdict, judged_as: str) -> None:
    from rich.table import Table
    from rich.text import Text

    reference_runtime, artifact_runtime = (f" ({runtime})" if runtime else "" for runtime in verdict.runtimes)
    out.print(f"A  {verdict.reference}{reference_runtime}", markup=False, soft_wrap=True)
    out.print(f"B  {verdict.artifact}{artifact_runtime}", markup=False, soft_wrap=True)
    if judged_as:
        out.print(f"   judged as {judged_as}", markup=False)
    table = Table(box=None, pad_edge=False)
    for title in ("check", "measured", "limit", "", ""):
        table.add_column(
            title, justify="right" if title in ("measured", "limit") else "left", no_wrap=bool(title)
        )
    for check in verdict.checks:
        state = "FAILED" if not check.passed else "-" if check.threshold is None else "ok"
        style = "bold red" if not check.passed else ""
        note = check.note if check.passed and len(check.note) <= _SHORT else "see below"
        table.add_row(check.name, _measured(check), _limit(check), Text(state, style=style), Text(note))
    out.print(table)
    for check in verdict.checks:
        if check.passed and len(check.note) > _SHORT:
            out.print(f"\n{check.name} (passed): {check.note}", markup=False)
    for check in verdict.failed:
        out.print(f"\n{check.name}: {check.note}", markup=False)
    out.print("\nB is A, within these limits." if verdict.passed else "\nB is not A.", markup=False)


def _measured(check: Check) -> str:
    return "" if check.measured is None else _shown(check.name, check.measured)


def _limit(check: Check) -> str:
    if check.threshold is None:
        return ""
    return f"{'≥' if check.bound == 'at least' else '≤'} {_shown(check.name, check.threshold)}"


def _shown(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    if name.startswith("kl"):
        return f"{value:.2g}" if value < 0.01 else f"{value:.3f}"
    if name == "perplexity ratio":
        return f"{value:.4f}"
    if name == "accuracy drop":
        return f"{value:.1%}".replace("-0.0%", "0.0%")
    return f"{value:.1%}" if name == "top-1 agreement" else f"{value:.0f}"

"""``arte-edge verify``: is this file still that model? A table of checks, and 3 if one fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arte_edge.console import Reporter, emit_json, err, out
from arte_edge.errors import GateError

if TYPE_CHECKING:
    from arte_edge.verify.gate import Verdict
    from arte_edge.verify.logits import Progress

__all__ = ["verify"]

_MODEL = "A name of 'models ls', a Hub id, a checkpoint folder, a .gguf file, or a folder with an ONNX model."


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
    from arte_edge import api

    with _progress() as progress:
        verdict = api.verify(
            reference,
            artifact,
            task=task,
            limit=limit,
            test=test,
            prompts=prompts,
            type=type_,
            bbh=bbh,
            threads=threads,
            progress=progress,
            reporter=Reporter(),
        )
    for note in verdict.notes:
        err.print(note, markup=False, soft_wrap=True)
    if as_json:
        emit_json(verdict.as_dict() | {"reason": verdict.reason})
    else:
        _print(verdict, type_ or verdict.judged_as)
    if not verdict.passed:
        names = ", ".join(check.name for check in verdict.failed)
        raise GateError(f"{verdict.artifact} is not {verdict.reference}: {names}")


@contextmanager
def _progress() -> Iterator[Progress]:
    """Yield a progress callback for stderr: in place on a terminal, a line a step elsewhere."""
    if err.is_terminal:
        with err.status("") as status:
            yield lambda step, done, total: status.update(f"{step} {done}/{total}" if total > 1 else step)
        return
    last = ""

    def line(step: str, done: int, total: int) -> None:
        nonlocal last
        if step != last:
            last = step
            err.print(step, markup=False, soft_wrap=True)

    yield line


def _print(verdict: Verdict, judged_as: str) -> None:
    from arte_edge.verify.check import long_notes

    reference_runtime, artifact_runtime = (f" ({runtime})" if runtime else "" for runtime in verdict.runtimes)
    out.print(f"A  {verdict.reference}{reference_runtime}", markup=False, soft_wrap=True)
    out.print(f"B  {verdict.artifact}{artifact_runtime}", markup=False, soft_wrap=True)
    if judged_as:
        out.print(f"   limits of {judged_as}", markup=False)
    out.print(verdict.table)
    for note in long_notes(verdict.checks):
        out.print(f"\n{note}", markup=False)
    out.print("\nB is A, within these limits." if verdict.passed else "\nB is not A.", markup=False)

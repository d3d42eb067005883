"""``arte-edge verify``: compare a model file with the model it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arte_edge.console import Reporter, emit_json, err, out, step_progress
from arte_edge.errors import GateError

if TYPE_CHECKING:
    from arte_edge.verify.gate import Verdict

_MODEL = "A name of 'models ls', a Hub id, a checkpoint folder, a .gguf file, or a folder with an ONNX model."


def verify(
    reference: Annotated[str, typer.Argument(metavar="A", help=f"The reference model. {_MODEL}")],
    artifact: Annotated[str, typer.Argument(metavar="B", help="The model to verify, named in the same ways.")],
    task: Annotated[
        str | None, typer.Option(help="Both models answer this task's validation examples (see `tasks ls`).")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Number of the task's examples; 0: all.")] = 100,
    test: Annotated[
        bool, typer.Option("--test", help="Use the task's test split. Only for a final evaluation.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Compare logits on these texts: .jsonl with `prompt`, or one per line."),
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option("--type", help="Use the thresholds of this type, for example Q4_K_M or int4."),
    ] = None,
    bbh: Annotated[Path | None, typer.Option(help="Folder of BIG-Bench-Hard files with the task.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of B's runtime.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a model file with the model it was made from.

    Compares tokens, chat template, stop tokens, logits, and answers to a task. The exit code is 3 if B differs
    from A by more than the thresholds of its quantization type.
    """
    from arte_edge import api

    with step_progress() as progress:
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
        err.print(note, soft_wrap=True)
    if as_json:
        emit_json(verdict.as_dict() | {"reason": verdict.reason})
    else:
        _print(verdict, type_ or verdict.thresholds_of)
    if not verdict.passed:
        names = ", ".join(check.name for check in verdict.failed)
        raise GateError(f"{verdict.artifact} does not match {verdict.reference}: {names}")


def _print(verdict: Verdict, type: str) -> None:
    from arte_edge.verify.check import long_notes

    reference_runtime, artifact_runtime = (f" ({runtime})" if runtime else "" for runtime in verdict.runtimes)
    out.print(f"A  {verdict.reference}{reference_runtime}", soft_wrap=True)
    out.print(f"B  {verdict.artifact}{artifact_runtime}", soft_wrap=True)
    if type:
        out.print(f"   thresholds of {type}")
    out.print(verdict.table)
    for note in long_notes(verdict.checks):
        out.print(f"\n{note}")
    out.print("\nPassed: B matches A." if verdict.passed else "\nFailed: B does not match A.")

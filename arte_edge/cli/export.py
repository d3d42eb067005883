"""``arte-edge export`` and ``verify``: files for a device, each verified against the student; or any two models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arte_edge.cli import interrupt
from arte_edge.console import Reporter, emit_json, err, out, step_progress
from arte_edge.errors import GateError, InputError

if TYPE_CHECKING:
    from arte_edge.export.outcome import Outcome
    from arte_edge.export.recipe import Recipe
    from arte_edge.export.source import Source
    from arte_edge.models.artifact import Format
    from arte_edge.verify.gate import Verdict

_MODEL = "A name of 'models ls', a Hub id, a checkpoint folder, a .gguf file, or a folder with an ONNX model."


def export(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|FOLDER|HUB-ID|GGUF",
            help="A run's folder or name, a checkpoint or LoRA adapter folder, a Hub id, a registry name, a GGUF.",
        ),
    ] = None,
    gguf: Annotated[str | None, typer.Option(metavar="TYPES", help="GGUF types, for example Q4_K_M,Q8_0,F16.")] = None,
    onnx: Annotated[
        str | None,
        typer.Option(metavar="FORMATS", help="int4, int8, fp32, optimum-fp32, optimum-int8[-arm64|-avx2|-avx512]."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A shipped recipe or your own .toml; --gguf and --onnx replace its formats.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Output folder. Default: RUN/export for a run, else NAME-export."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task to verify with, for a source that is not a run (see `tasks ls`).")
    ] = None,
    base: Annotated[str | None, typer.Option(help="An adapter's 16-bit base, instead of the one it names.")] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option("--llama-cpp", metavar="DIR", help="Convert with this checkout of llama.cpp.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List recipes and formats, and exit.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print predicted sizes and memory; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another student's files in DIR.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use only models on this machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout, the last with the result.")] = False,
) -> None:
    """Export a student to GGUF and ONNX, and verify each file.

    A file that fails verification is named *.rejected and the exit code is 3. Run the same command again to
    resume after an interruption; finished files are not built again.
    """
    if list_:
        _show_list(as_json)
        return
    if source is None:
        raise InputError("Missing argument SOURCE", "Name a run, a checkpoint folder, a Hub id or a GGUF; see --help.")
    from arte_edge import api

    reporter = Reporter(as_json=as_json)
    opened, formats, settings, folder = api.plan_export(
        source, gguf=gguf, onnx=onnx, recipe=recipe, out=out, task=task, base=base, offline=offline, reporter=reporter
    )
    if dry_run:
        _show_estimate(opened, formats, settings, folder, as_json)
        return
    from arte_edge.export.pipeline import export as run

    interrupt.resumes()
    reporter.say(f" → {folder}: {', '.join(f.label for f in formats)}", opened.name)
    outcome = run(opened, formats, settings, folder, reporter, llama_cpp=llama_cpp, force=force)
    _show_outcome(outcome, as_json)


def _show_estimate(source: Source, formats: tuple[Format, ...], recipe: Recipe, folder: Path, as_json: bool) -> None:
    from arte_edge.checkpoint import shapes_of
    from arte_edge.export.outcome import estimate

    found = estimate(shapes_of(source.checkpoint), formats, recipe, n_training=len(source.training))
    if as_json:
        emit_json(found.as_dict(source, folder))
        return
    out.print(found.table(source.name))
    for note in found.notes(source, folder):
        out.print(note, soft_wrap=True)


def _show_outcome(outcome: Outcome, as_json: bool) -> None:
    """Print the outcome; raise for the exit code.

    Raises GateError: a file was rejected; ArteError: no file was, but a format could not be built.
    """
    if as_json:
        failures = [
            {"format": f.format.label, "message": f.error.message, "hint": f.error.hint} for f in outcome.failures
        ]
        emit_json(
            {
                "event": "done",
                "folder": str(outcome.folder),
                "rejected": [artifact.file for artifact in outcome.rejected],
                "failures": failures,
                "student": outcome.student.model_dump(mode="json"),
            }
        )
    else:
        outcome.show(out)
    if outcome.rejected:
        names = ", ".join(artifact.file for artifact in outcome.rejected)
        raise GateError(f"Verification failed: {names}", "See the reasons above or in student.json.")
    if outcome.failures:
        raise outcome.failures[0].error


def _show_list(as_json: bool) -> None:
    """Print the shipped recipes and all formats."""
    from arte_edge import catalog
    from arte_edge.export.recipe import load_recipe
    from arte_edge.gguf.reader import QUANT_TYPES
    from arte_edge.models.artifact import ARCHS

    onnx = ("int4", "int8", "fp32", "optimum-fp32", *(f"optimum-int8-{arch}" for arch in ARCHS))
    rows = []
    for name in catalog.names("export"):
        about = catalog.describe(catalog.find("export", name).read_text("utf-8"))
        rows.append((name, about, [format.label for format in load_recipe(name).formats]))
    if as_json:
        keys = ("name", "description", "formats")
        recipes = [dict(zip(keys, row, strict=True)) for row in rows]
        emit_json({"recipes": recipes, "gguf": list(QUANT_TYPES), "onnx": onnx})
        return
    for name, about, formats in rows:
        out.print(f"{name:<16}{about}", soft_wrap=True)
        out.print(f"{'':<16}{', '.join(formats)}", soft_wrap=True)
    out.print(f"\n--gguf  {', '.join(QUANT_TYPES)}")
    out.print(f"--onnx  {', '.join(onnx)}")


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
        Path | None, typer.Option(help="Compare logits on these texts: .jsonl with `prompt`, or one per line.")
    ] = None,
    type_: Annotated[
        str | None, typer.Option("--type", help="Use the thresholds of this type, for example Q4_K_M or int4.")
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

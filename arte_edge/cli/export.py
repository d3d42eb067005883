"""``arte-edge export``: the files for a device, each verified against the student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arte_edge.console import Reporter, emit_json, out
from arte_edge.errors import GateError, InputError

if TYPE_CHECKING:
    from arte_edge.export.pipeline import Outcome

__all__ = ["export"]


def export(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|FOLDER|HUB-ID|GGUF",
            help="A run's folder or name, a checkpoint or LoRA adapter folder, a Hub id, a registry name, a GGUF.",
        ),
    ] = None,
    gguf: Annotated[
        str | None, typer.Option(metavar="TYPES", help="GGUF types, as in Q4_K_M,Q8_0,F16.")
    ] = None,
    onnx: Annotated[
        str | None,
        typer.Option(
            metavar="FORMATS", help="int4, int8, fp32, optimum-fp32, optimum-int8[-arm64|-avx2|-avx512]."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A shipped recipe or your own .toml; --gguf and --onnx replace its formats."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where to; RUN/export for a run, else NAME-export."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task to verify with, for a source that is no run (see `tasks ls`).")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="An adapter's 16-bit base, in place of the one it names.")
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option("--llama-cpp", metavar="DIR", help="Convert with your checkout of llama.cpp."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List recipes and formats, and stop.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print predicted sizes and memory; write nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another student's files that lie in DIR.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use only models of this machine.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines on stdout, the last with the result.")
    ] = False,
) -> None:
    """Export a student to GGUF and ONNX files, and verify each against it.

    A file that fails is named *.rejected and the exit code is 3. Re-run the same command
    to resume after an interruption; finished files are kept.
    """
    if list_:
        _show_list(as_json)
        return
    if source is None:
        raise InputError(
            "Missing argument SOURCE", "Name a run, a checkpoint folder, a Hub id or a GGUF; see --help."
        )
    from arte_edge import api

    reporter = Reporter(as_json=as_json)
    opened, formats, plan, folder = api.plan_export(
        source,
        gguf=gguf,
        onnx=onnx,
        recipe=recipe,
        out=out,
        task=task,
        base=base,
        offline=offline,
        reporter=reporter,
    )
    if dry_run:
        from arte_edge.export.estimate import show_plan

        show_plan(opened, formats, plan, folder, as_json)
        return
    from arte_edge.export.pipeline import export as run

    reporter.say(f"[bold]{opened.name}[/] → {folder}: {', '.join(f.label for f in formats)}")
    outcome = run(opened, formats, plan, folder, reporter, llama_cpp=llama_cpp, force=force)
    _close(outcome, folder, as_json)


def _close(outcome: Outcome, folder: Path, as_json: bool) -> None:
    """Print the table, and end with the right exit code.

    Raises:
        GateError: a file was rejected.
        ArteError: no file was, but a format could not be made.
    """
    from arte_edge.export.table import show_outcome

    if as_json:
        failures = [
            {"format": f.format.label, "message": f.error.message, "hint": f.error.hint}
            for f in outcome.failures
        ]
        emit_json(
            {
                "event": "done",
                "folder": str(folder),
                "rejected": [artifact.file for artifact in outcome.rejected],
                "failures": failures,
                "student": outcome.student.model_dump(mode="json"),
            }
        )
    else:
        show_outcome(out, outcome, folder)
    if outcome.rejected:
        names = ", ".join(artifact.file for artifact in outcome.rejected)
        raise GateError(f"Not the student: {names}", "The reasons stand above and in student.json.")
    if outcome.failures:
        raise outcome.failures[0].error


def _show_list(as_json: bool) -> None:
    """Print the shipped recipes and every format there is."""
    from arte_edge import catalog
    from arte_edge.export.recipe import load_recipe
    from arte_edge.gguf.types import QUANT_TYPES
    from arte_edge.models.formats import ARCHS

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
        out.print(f"{name:<16}{about}", markup=False, soft_wrap=True)
        out.print(f"{'':<16}{', '.join(formats)}", markup=False, soft_wrap=True)
    out.print(f"\n--gguf  {', '.join(QUANT_TYPES)}", markup=False)
    out.print(f"--onnx  {', '.join(onnx)}", markup=False)

"""``arte-edge models``: list, download, convert and check models."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arte_edge.cli import interrupt
from arte_edge.console import emit_json, err, out

if TYPE_CHECKING:
    from arte_edge.models.registry import Entry

app = typer.Typer(help="List, download and check models.", no_args_is_help=True)

_REF = "A name of 'models ls', a .gguf file, a checkpoint folder or a Hub id (org/name[@revision][:QUANT])."

Ref = Annotated[str, typer.Argument(help=_REF)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Checkpoint = Annotated[bool, typer.Option("--checkpoint", help="As safetensors folder; a GGUF is converted once.")]


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """List named models, and which are on this machine."""
    from arte_edge.cache import user_registry
    from arte_edge.models import registry

    models = [_summary(entry) for entry in registry.entries().values()]
    if as_json:
        emit_json(models)
        return
    from rich.table import Table

    from arte_edge.cache import megabytes

    table = Table(box=None, pad_edge=False)
    for title in ("model", "role", "size", "licence", "cached"):
        table.add_column(title, justify="right" if title == "size" else "left", no_wrap=title == "model")
    for model in models:
        cached = ["file"] if model["path"] else []
        cached += ["checkpoint"] if model["checkpoint"] else []
        row = (model["name"], model["role"], megabytes(model["size_bytes"]), model["license"])
        table.add_row(*row, " + ".join(cached) or "-")
    out.print(table)
    err.print(f"Add your own in {user_registry()}", soft_wrap=True)


@app.command("pull")
def pull(
    refs: Annotated[list[str], typer.Argument(help=_REF)],
    checkpoint: Checkpoint = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
    as_json: Json = False,
) -> None:
    """Download and verify models.

    With --checkpoint, also convert GGUFs to safetensors for training.
    """
    from arte_edge.console import model_progress
    from arte_edge.models import resolve

    interrupt.resumes()
    pulled = []
    for ref in refs:
        with model_progress(ref) as progress:
            model = resolve(ref, offline=offline, progress=progress)
            folder = model.checkpoint(progress) if checkpoint else None
        pulled.append(asdict(model) | {"checkpoint": folder})
        if as_json:
            continue
        out.print(f"{model.name}  {model.quantization}  sha256 {model.sha256[:16]}…")
        for path in (model.gguf or model.folder, folder):
            if path:
                out.print(f"  {path}", soft_wrap=True)
    if as_json:
        emit_json(pulled)


@app.command("path")
def path(ref: Ref, checkpoint: Checkpoint = False, as_json: Json = False) -> None:
    """Print the path of a model on this machine.

    Downloads nothing; a model that is not on this machine is an error.
    """
    from arte_edge.console import model_progress
    from arte_edge.models import resolve

    with model_progress(ref) as progress:
        model = resolve(ref, offline=True, progress=progress)
        found = model.checkpoint(progress) if checkpoint else model.gguf or model.folder
    if as_json:
        emit_json({"name": model.name, "path": found})
    else:
        out.print(str(found), soft_wrap=True)


@app.command("check")
def check(
    refs: Annotated[list[str] | None, typer.Argument(help=_REF + " Default: all named models.")] = None,
    as_json: Json = False,
) -> None:
    """Read models completely and compare checksums.

    Exit code 1 if one is damaged, or given and missing.
    """
    from arte_edge.models import registry
    from arte_edge.models.resolve import check as check_model

    findings = [check_model(ref) for ref in refs or registry.entries()]
    if as_json:
        emit_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            out.print(f"{finding.state:8}{finding.name}")
            out.print(f"        {finding.detail}", soft_wrap=True)
    bad = {"damaged", "missing"} if refs else {"damaged"}
    if any(finding.state in bad for finding in findings):
        raise typer.Exit(1)


def _summary(entry: Entry) -> dict[str, Any]:
    """Return an entry of the registry with the paths of its file and checkpoint, None if not cached."""
    from arte_edge.gguf.to_hf import checkpoint_folder
    from arte_edge.models.registry import cached

    folder = checkpoint_folder(entry.name, entry.sha256)
    return dict(entry.model_dump(mode="json")) | {
        "path": cached(entry),
        "checkpoint": folder if folder.is_dir() else None,
    }

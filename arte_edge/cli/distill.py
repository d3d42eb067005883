"""``arte-edge distill``: turn a task into a tailored student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arte_edge.errors import InputError

if TYPE_CHECKING:
    from arte_edge.distill.config import RunConfig
    from arte_edge.distill.deploy import DeviceSide

__all__ = ["distill"]


def distill(
    run: Annotated[
        str | None, typer.Argument(help="A run.toml, or a shipped preset's name (see `arte-edge ls`).")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task: a shipped name, a folder, hub:org/name.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher: name, path, Hub id, openai:MODEL@URL.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="Student: name, path or Hub id.")] = None,
    bbh: Annotated[
        Path | None, typer.Option(help="Folder of BIG-Bench-Hard files that holds the task.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders lie.")] = Path("runs"),
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override one key, as in align.learning_rate=1e-6.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say calls, tokens, minutes and cost from a short probe, and stop."),
    ] = False,
    prices: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPT,COMPLETION",
            help="For --dry-run: dollars for a million tokens of a teacher behind a server.",
        ),
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Go on although the teacher is not clearly above the student.")
    ] = False,
    update: Annotated[
        bool,
        typer.Option("--update", help="Change the settings of a run that exists; finished calls are kept."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines on stdout.")] = False,
) -> None:
    """Distil a student: check, elicit, calibrate, prefer, align, tailor, tune, evaluate.

    Killed at any moment, the same command goes on where it stopped.
    """
    from arte_edge import catalog
    from arte_edge.distill.settings import build, load_toml, parse_set

    path = catalog.find("presets", run) if run is not None else None
    flags: dict[str, Any] = {
        **({"name": name} if name else {}),
        **({"task": _given(ref=task, bbh=str(bbh.resolve()) if bbh else None)} if task or bbh else {}),
        **({"teacher": {"model": teacher}} if teacher else {}),
        **({"student": {"model": student}} if student else {}),
    }
    layers = [load_toml(path)] if path else []
    config = build(run or "--set", *layers, flags, parse_set(set_ or []))
    if prices and not dry_run:
        raise InputError("--prices goes with --dry-run", "A run itself counts calls and tokens, not dollars.")
    if dry_run:
        from arte_edge.distill.dry_run import dry_run as plan_run
        from arte_edge.distill.dry_run import parse_prices

        plan_run(config, prices=parse_prices(prices) if prices else None, as_json=as_json)
        return
    from arte_edge.distill.pipeline import run_pipeline

    folder_name = config.name or (
        path.stem if path else f"{Path(config.task.ref).stem}-{_short(config.student.model)}"
    )
    folder = runs / folder_name
    run_pipeline(
        config, folder, anyway=anyway, update=update, as_json=as_json, device_side=_device_side(config)
    )


def _device_side(config: RunConfig) -> DeviceSide | None:
    """Return what a run needs of the rooms above it, None if it needs nothing."""
    if not (config.deploy.device or config.prefer.student_file):
        return None
    from arte_edge.distill.deploy import DeviceSide
    from arte_edge.gguf.quantize import quantize
    from arte_edge.publish.deploy_rates import deploy_rates

    return DeviceSide(deploy_rates, quantize)


def _given(**values: str | None) -> dict[str, str]:
    return {key: value for key, value in values.items() if value is not None}


def _short(model: str) -> str:
    return Path(model.split("@")[0].split(":")[-1]).name.lower().removesuffix(".gguf")

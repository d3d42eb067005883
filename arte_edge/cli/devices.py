"""``arte-edge devices``: device profiles, this machine, and the user's own devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arte_edge.console import emit_json, err, out

if TYPE_CHECKING:
    from arte_edge.device.model_size import ModelSize
    from arte_edge.device.profiles import Profile

app = typer.Typer(help="List, show, add and check devices.", no_args_is_help=True)

_REF = "A name of 'devices ls', a .toml file, or user@host."

Ref = Annotated[str, typer.Argument(help=_REF)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[
    Path | None, typer.Option("--model", metavar="PATH", help="Print whether this model fits and its predicted speed.")
]
Context = Annotated[int, typer.Option("--context", min=1, help="Tokens of context, with --model.")]


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """List the shipped profiles and your own devices."""
    from arte_edge.device.profiles import find_device, own_folder, own_names, shipped

    devices = [*shipped(), *(find_device(name) for name in own_names())]
    if as_json:
        emit_json([_json(device) for device in devices])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title, justify in (("device", "left"), ("memory", "right"), ("cores", "right"), ("decodes", "right")):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("what", overflow="fold")
    for device in devices:
        rate = device.effective_bandwidth
        table.add_row(
            device.name,
            f"{device.memory_bytes[0] / 2**30:g} GB",
            str(device.cores),
            f"{rate.value / 1e9:.1f} GB/s" if rate else "?",
            f"{device.title}, {device.remote.host}" if device.remote else device.title,
        )
    out.print(table)
    err.print(f"Your own are in {own_folder()}", soft_wrap=True)


@app.command("show")
def show(device: Ref, model: Model = None, context: Context = 2048, as_json: Json = False) -> None:
    """Print the facts of a device with their sources.

    With --model, also whether the model fits and its predicted speed.
    """
    from arte_edge.device.memory_estimate import fit_profile
    from arte_edge.device.model_size import ModelSize
    from arte_edge.device.profiles import find_device
    from arte_edge.device.roofline import expected

    profile = find_device(device)
    size = ModelSize.of(model) if model else None
    fits = fit_profile(size, profile, context) if size else None
    speed = expected(size, profile, context) if size else None
    if as_json:
        emit_json(_json(profile) | _model_json(size, fits, speed))
        return
    _show_profile(profile)
    if size and fits:
        _show_model(size, fits, speed)


@app.command("detect")
def detect(
    probe: Annotated[bool, typer.Option("--probe", help="Measure memory bandwidth, about 2 seconds; cached.")] = False,
    model: Model = None,
    context: Context = 2048,
    as_json: Json = False,
) -> None:
    """Print this machine's hardware, profile and sensors."""
    from arte_edge.device.detect import board
    from arte_edge.device.detect import detect as facts_of
    from arte_edge.device.memory_estimate import fit, repacked_types
    from arte_edge.device.model_size import ModelSize
    from arte_edge.device.roofline import bandwidth, expected, is_busy
    from arte_edge.machine import available_bytes

    facts = facts_of()
    found: dict[str, Any] = facts.model_dump(mode="json") | {"board": board()}
    found |= {"available_bytes": available_bytes(), "sensors": _sensors()}
    if (probe or model) and is_busy():
        err.print("This machine is busy: the bandwidth is measured too low and not cached.")
    rate = bandwidth(facts.cores, fresh=probe) if probe or model else None
    found["read_bytes_per_s"] = rate if probe else None
    size = ModelSize.of(model) if model else None
    repacked = repacked_types(facts.arch, facts.features)
    fits = fit(size, found["available_bytes"], context, repacked=repacked) if size else None
    speed = expected(size, rate, context) if size and rate else None
    if as_json:
        emit_json(found | _model_json(size, fits, speed))
        return
    for key, value in found.items():
        _line(key, _readable(key, value))
    if size and fits:
        _show_model(size, fits, speed)


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="A name, for example kitchen-pi.")],
    host: Annotated[str, typer.Argument(metavar="USER@HOST", help="As for ssh; an alias from ~/.ssh/config works.")],
    base: Annotated[str, typer.Option(help="Shipped profile to inherit facts from.")] = "",
    workdir: Annotated[str, typer.Option(help="Work folder there. [~/.cache/arte-edge-device]")] = "",
    python: Annotated[str, typer.Option(help="Python interpreter there, 3.11 or newer.")] = "",
    title: Annotated[str, typer.Option(help="Display name.")] = "",
    notes: Annotated[str, typer.Option(help="Cooling, power supply, place; recorded in results.")] = "",
    as_json: Json = False,
) -> None:
    """Add a device of your own.

    Nothing is sent to it; `devices check` connects to it.
    """
    from arte_edge.device.profiles import add_device

    path = add_device(name, host, base=base, workdir=workdir, python=python, title=title, notes=notes)
    if as_json:
        emit_json({"name": name, "file": str(path)})
        return
    out.print(f"Wrote {path}. Next: `arte-edge devices check {name}`.", soft_wrap=True)


@app.command("check")
def check(
    device: Ref,
    clean: Annotated[bool, typer.Option("--clean", help="Also remove arte-edge's work folder there.")] = False,
    as_json: Json = False,
) -> None:
    """Check over ssh that a device is ready to measure.

    Changes nothing there without --clean.
    """
    from dataclasses import asdict

    from arte_edge.device.profiles import find_device
    from arte_edge.device.ssh.environment import check as check_device
    from arte_edge.device.ssh.workdir import clean as remove
    from arte_edge.errors import ArteError

    profile = find_device(device)
    report = check_device(profile)
    failed = [finding for finding in report.findings if finding.state == "failed"]
    unreached = any(finding.what == "ssh" for finding in failed)
    removed = remove(profile) if clean and not unreached else ""
    if as_json:
        emit_json(asdict(report) | {"removed": removed})
    else:
        for finding in report.findings:
            _line(finding.what, finding.text if finding.state == "ok" else f"{finding.state}: {finding.text}")
            if finding.hint:
                _line("", finding.hint)
        if removed:
            _line("removed", removed)
    if failed:
        raise ArteError(f"{device} is not ready: {failed[0].text}", failed[0].hint)


@app.command("rm")
def rm(name: Annotated[str, typer.Argument(help="A device of your own.")], as_json: Json = False) -> None:
    """Remove a device from your list.

    Nothing on the device changes.
    """
    from arte_edge.device.profiles import remove_device

    path = remove_device(name)
    if as_json:
        emit_json({"name": name, "file": str(path)})
    else:
        out.print(f"Removed {path}", soft_wrap=True)


def _sensors() -> list[str]:
    """Return which readings this machine gives; one reading of each is taken."""
    from arte_edge.bench.sensors import Sensors

    with Sensors() as sensors:
        pass
    first = sensors.readings()[0]
    return [key for key, value in first.model_dump(exclude={"t_s"}).items() if value is not None]


def _json(profile: Profile) -> dict[str, Any]:
    return profile.model_dump(mode="json", exclude_none=True)


def _model_json(size: ModelSize | None, fits: Any, speed: Any) -> dict[str, Any]:
    from dataclasses import asdict

    if size is None:
        return {}
    return {"model": asdict(size), "fit": fits.as_json(), "expected": asdict(speed) if speed else None}


def _show_profile(profile: Profile) -> None:
    facts = profile.facts()
    for key, value in profile.model_dump(exclude_none=True).items():
        if not value:
            continue
        if key in facts:
            fact = facts[key]
            _line(key, f"{_fact_text(key, fact.value)}  ({fact.evidence}: {fact.source})")
        elif key in ("remote", "runtimes"):
            _line(key, ", ".join(f"{part} = {_readable(part, item)}" for part, item in value.items() if item))
        elif key == "notes":
            for note in value:
                _line("note", note)
        elif key not in ("match", "sources"):
            source = profile.sources.get(key, "")
            _line(key, _readable(key, value) + (f"  ({source})" if source else ""))


def _show_model(size: ModelSize, fits: Any, speed: Any) -> None:
    _line("model", f"{size.name}: {size.quantization or size.format}, {size.token_bytes / 1e6:.1f} MB a token")
    _line("fit", fits.summary())
    if fits.verdict == "no":
        _line("", f"largest context that fits: {fits.largest_context_tokens} tokens")
    if speed:
        bound = "at most" if speed.is_upper_bound else "about"
        _line("expected", f"{bound} {speed.decode_tokens_per_s:.1f} tokens/s ({speed.source}: {speed.basis})")
    else:
        _line("expected", "unknown: this device's memory bandwidth is not known")


def _fact_text(key: str, value: float) -> str:
    """Return a fact of a profile with its unit; the names are those of `profile.Profile`."""
    if key.endswith("_bandwidth"):
        return f"{value / 1e9:.1f} GB/s"
    unit = {"power_w": "W", "throttle_c": "°C", "token_overhead_s": "s"}.get(key, "")
    return f"{value:g} {unit}".rstrip()


def _readable(key: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_readable(key, item) for item in value) or "-"
    if value is None or value == "":
        return "-"
    if key.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB"
    return f"{value / 1e9:.1f} GB/s" if key.endswith("_per_s") else str(value)


def _line(key: str, text: str) -> None:
    """Print one fact in 80 columns, its name at the left."""
    from textwrap import wrap

    for number, part in enumerate(wrap(text, 58, break_long_words=False, break_on_hyphens=False) or ["-"]):
        out.print(f"{'' if number else key:<21}{part}", soft_wrap=True)

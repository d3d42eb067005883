"""``arte-edge recommend``: which file to take on a device, and why. In 80 columns, or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arte_edge.console import emit_json, err, out
from arte_edge.errors import ArteError, InputError

if TYPE_CHECKING:
    from rich.table import Table

    from arte_edge.device.profile import Profile
    from arte_edge.publish.front import Candidate, Figure
    from arte_edge.publish.recommend import Recommendation

__all__ = ["recommend"]

_DASH = "–"


def recommend(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|FOLDER", help="A run's folder or name, or a folder with student.json."),
    ],
    device: Annotated[
        str | None,
        typer.Option(help="Profile (see `arte-edge devices ls`) or fingerprint; this machine unless given."),
    ] = None,
    max_ram: Annotated[str | None, typer.Option(metavar="SIZE", help="Peak memory: 1GB, 512MiB.")] = None,
    max_size: Annotated[str | None, typer.Option(metavar="SIZE", help="Size of the file.")] = None,
    min_decode: Annotated[float | None, typer.Option(help="Tokens a second written, at least.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Points of accuracy below the 16-bit student, at most.")
    ] = None,
    max_answer_seconds: Annotated[
        float | None, typer.Option(help="Seconds from a prompt to the end of its answer, at most.")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Length of a prompt, where answers were not timed on the device.")
    ] = 256,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer, likewise.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Say which exported file to take on a device, by accuracy, speed and size.

    What was not measured on the device is predicted and marked ~. Exit code 1 if no
    file keeps every wish; the last line then says which wish to relax, and to what.
    """
    from arte_edge.publish.predict import predictor
    from arte_edge.publish.recommend import device_names
    from arte_edge.publish.recommend import recommend as choose
    from arte_edge.publish.wants import Wants, parse_size
    from arte_edge.publish.where import find_export, read_bench, read_export

    wants = Wants(
        max_ram_bytes=parse_size(max_ram, "--max-ram") if max_ram else None,
        min_decode=min_decode,
        max_drop=max_drop,
        max_size_bytes=parse_size(max_size, "--max-size") if max_size else None,
        max_answer_seconds=max_answer_seconds,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
    )
    folder = find_export(source)
    student, rows = read_export(folder), read_bench(folder)
    speeds = [speed for artifact in student.artifacts for speed in artifact.speeds]
    known = {name for speed in speeds for name in (speed.device, speed.fingerprint) if name}
    known |= {name for row in rows for name in (row.device.profile, row.device.fingerprint) if name}
    profile, names = _device(device, known)
    predict = predictor(folder, profile, prompt_tokens + answer_tokens) if profile.name else None
    found = choose(student, profile, wants, rows=rows, predict=predict, names=names | device_names(profile))
    if as_json:
        emit_json(_document(found, folder))
    else:
        _show(found, wants.any)
    if found.pick is None:
        hint = f"Relax {found.relax.text}." if found.relax else "Run `arte-edge bench` on the device first."
        raise ArteError(found.why, hint)


def _device(ref: str | None, known: set[str]) -> tuple[Profile, frozenset[str]]:
    """Return the profile behind `ref`, and further names that its results may stand under.

    A fingerprint that was measured needs no profile; nothing can be predicted for it then.
    """
    from arte_edge.device.catalogue import find_device
    from arte_edge.device.profile import Profile

    if ref is None:
        from arte_edge.device.detect import detect

        facts = detect()
        names = frozenset({facts.fingerprint, facts.profile} - {""})
        if facts.profile:
            return find_device(facts.profile), names
        err.print("This machine matches no profile: nothing can be predicted for it.", markup=False)
        return Profile(title="this machine", cores=facts.cores, memory_bytes=(facts.memory_bytes,)), names
    try:
        return find_device(ref), frozenset({ref})
    except InputError:
        if ref not in known:
            raise
        return Profile(title=ref, cores=1, memory_bytes=(1,)), frozenset({ref})


def _show(found: Recommendation, wished: bool) -> None:
    out.print(f"Files for {found.device}", style="bold", markup=False)
    out.print(_table(found))
    for drop in found.drops:
        where = f"{_short(found, drop.file)} is out"
        wish = "" if drop.wish == "gate" else f" (--{drop.wish.replace('_', '-')})"
        out.print(f"{where}{wish}: {drop.reason}", markup=False)
    for note in found.notes:
        out.print(note, markup=False)
    if found.pick is not None:
        from arte_edge.publish.recommend import drop_text

        accuracy = found.candidate(found.pick).accuracy
        against = f" Against the 16-bit student: {drop_text(accuracy)}." if accuracy else ""
        out.print(f"\nTake {Path(found.pick).name}.", style="bold", markup=False)
        why = found.why if wished else found.why.replace(" that keep every wish", "")
        out.print(why + against, markup=False)


def _table(found: Recommendation) -> Table:
    from rich import box
    from rich.table import Table

    from arte_edge.publish.wants import size_text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("file", overflow="fold", min_width=12)
    for name in ("size", "memory", "tokens/s", "answer", "accuracy", "drop"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    out_files = {drop.file for drop in found.drops}
    for c in found.candidates:
        mark = "pick" if c.file == found.pick else "out" if c.file in out_files else ""
        front = "*" if c.file in found.front.files else ""
        table.add_row(
            _short(found, c.file) + front,
            size_text(c.artifact.size_bytes),
            _cell(c.ram, size_text),
            _cell(c.decode, lambda v: f"{v:.1f}"),
            _cell(c.answer_s, lambda v: f"{v:.1f} s"),
            _accuracy(c),
            _drop(c),
            mark,
        )
    axes = ", ".join(found.front.axes)
    table.caption = f"* on the front of {axes}: no other file is better in one and as good in the rest"
    table.caption_justify = "left"
    return table


def _short(found: Recommendation, file: str) -> str:
    """Leave out what all the names begin with: the student's name."""
    return f"…{file.removeprefix(found.model)}" if file.startswith(found.model) else file


def _cell(figure: Figure | None, show: Any) -> str:
    return _DASH if figure is None else f"{'~' if figure.predicted else ''}{show(figure.value)}"


def _accuracy(c: Candidate) -> str:
    a = c.accuracy
    return _DASH if a is None else f"{a.accuracy:.0%} ({100 * a.low:.0f}–{100 * a.high:.0f})"


def _drop(c: Candidate) -> str:
    difference = c.accuracy.difference if c.accuracy else None
    return _DASH if difference is None else f"{100 * difference:+.1f}"


def _document(found: Recommendation, folder: Path) -> dict[str, Any]:
    from dataclasses import asdict

    files = [
        {
            "file": c.file,
            "quantization": c.artifact.quantization,
            "size_bytes": c.artifact.size_bytes,
            "on_front": c.file in found.front.files,
            "accuracy": c.accuracy.model_dump(mode="json") if c.accuracy else None,
            "decode_tokens_per_s": asdict(c.decode) if c.decode else None,
            "prefill_tokens_per_s": asdict(c.prefill) if c.prefill else None,
            "ram_bytes": asdict(c.ram) if c.ram else None,
            "answer_seconds": asdict(c.answer_s) if c.answer_s else None,
        }
        for c in found.candidates
    ]
    return {
        "device": found.device,
        "folder": folder.name,
        "pick": found.pick,
        "why": found.why,
        "front": asdict(found.front),
        "files": files,
        "dropped": [asdict(drop) for drop in found.drops],
        "relax": [{"wish": wish, "to": value} for wish, value in found.relax.wishes] if found.relax else [],
        "notes": list(found.notes),
    }

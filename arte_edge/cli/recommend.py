"""``arte-edge recommend``: which file to use on a device, and why. In 80 columns, or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arte_edge.console import emit_json, out
from arte_edge.errors import ArteError

if TYPE_CHECKING:
    from rich.table import Table

    from arte_edge.publish.recommend.pareto import Candidate, Metric
    from arte_edge.publish.recommend.pick import Recommendation

__all__ = ["recommend"]

_DASH = "–"


def recommend(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|FOLDER", help="A run's folder or name, or a folder with student.json."),
    ],
    device: Annotated[
        str | None,
        typer.Option(help="Profile (see `arte-edge devices ls`) or fingerprint; default: this machine."),
    ] = None,
    max_ram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Maximum peak memory: 1GB, 512MiB.")
    ] = None,
    max_size: Annotated[str | None, typer.Option(metavar="SIZE", help="Maximum size of the file.")] = None,
    min_decode: Annotated[float | None, typer.Option(help="Minimum decode rate, tokens per second.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Maximum accuracy lost against the 16-bit student, in points.")
    ] = None,
    max_answer_seconds: Annotated[
        float | None, typer.Option(help="Maximum seconds from a prompt to the end of its answer.")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt length, where answers were not timed on the device.")
    ] = 256,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Answer length, likewise.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Recommend one exported file for a device, by accuracy, speed and size.

    What was not measured on the device is predicted and marked ~. Exit code 1 if no
    file satisfies all constraints; the last line then says which to relax, and to what.
    """
    from arte_edge.publish.recommend.pick import recommend as find

    found = find(
        source,
        device=device,
        max_ram=max_ram,
        max_size=max_size,
        min_decode=min_decode,
        max_drop=max_drop,
        max_answer_seconds=max_answer_seconds,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
    )
    if as_json:
        emit_json(found.as_dict())
    else:
        _show(found)
    if found.pick is None:
        raise ArteError(found.why, found.hint)


def _show(found: Recommendation) -> None:
    out.print(f"Files for {found.device}", style="bold", markup=False)
    out.print(_table(found))
    for one in found.violations:
        option = "" if one.constraint == "gate" else f" (--{one.constraint.replace('_', '-')})"
        out.print(f"{_short(found, one.file)} is excluded{option}: {one.reason}", markup=False)
    for note in found.notes:
        out.print(note, markup=False)
    if found.pick is not None:
        from arte_edge.publish.recommend.pick import drop_text

        accuracy = found.candidate(found.pick).accuracy
        against = f" Against the 16-bit student: {drop_text(accuracy)}." if accuracy else ""
        out.print(f"\nUse {Path(found.pick).name}.", style="bold", markup=False)
        out.print(found.why + against, markup=False)


def _table(found: Recommendation) -> Table:
    from rich import box
    from rich.table import Table

    from arte_edge.publish.recommend.constraints import size_text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("file", overflow="fold", min_width=12)
    for name in ("size", "memory", "tokens/s", "answer", "accuracy", "drop"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    excluded = {one.file for one in found.violations}
    for c in found.candidates:
        mark = "pick" if c.file == found.pick else "excluded" if c.file in excluded else ""
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
    table.caption = f"* on the Pareto front of {axes}: no other file is better in one and as good in the rest"
    table.caption_justify = "left"
    return table


def _short(found: Recommendation, file: str) -> str:
    """Leave out what all the names begin with: the student's name."""
    return f"…{file.removeprefix(found.model)}" if file.startswith(found.model) else file


def _cell(metric: Metric | None, show: Any) -> str:
    return _DASH if metric is None else f"{'~' if metric.predicted else ''}{show(metric.value)}"


def _accuracy(c: Candidate) -> str:
    a = c.accuracy
    return _DASH if a is None else f"{a.accuracy:.0%} ({100 * a.low:.0f}–{100 * a.high:.0f})"


def _drop(c: Candidate) -> str:
    difference = c.accuracy.difference if c.accuracy else None
    return _DASH if difference is None else f"{100 * difference:+.1f}"

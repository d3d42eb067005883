"""``arte-edge recommend``: which file to use on a device, and why. In 80 columns, or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from arte_edge.console import emit_json, out
from arte_edge.errors import ArteError

if TYPE_CHECKING:
    from arte_edge.publish.recommend.recommendation import Recommendation

__all__ = ["recommend"]


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
    """Recommend the best exported file for a device.

    By accuracy, speed and size. What was not measured on the device is predicted and marked ~. Exit code 1 if no
    file satisfies all constraints; the last line then says which to relax, and to what.
    """
    from arte_edge import api

    found = api.recommend(
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
    out.print(f"Files for {found.device}", style="bold")
    out.print(found.table)
    for line in found.lines:
        out.print(line)
    if found.pick is not None:
        first, *more = found.choice
        out.print(f"\n{first}", style="bold")
        for line in more:
            out.print(line)

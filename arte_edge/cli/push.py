"""``arte-edge push``: show what would go to the Hub; send it only with ``--yes``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arte_edge.console import emit_json, err, out

if TYPE_CHECKING:
    from arte_edge.publish.hub import Preview

__all__ = ["push"]


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="An export's folder, or a checkpoint's, with its card.")
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="USER/REPO", help="Repository on the Hub; created if missing.")
    ],
    yes: Annotated[
        bool, typer.Option("--yes", help="Send it. Without this nothing leaves the machine.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Allow TEXT although the privacy scan flags it; may be repeated."),
    ] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Message of the commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Upload an export to the Hugging Face Hub.

    Only with --yes; otherwise shows what would be uploaded. Stops (exit 2) if a file holds personal data:
    a host, a user, an address, a path, a token. Files that the gate rejected are never sent.
    """
    from arte_edge.publish.hub import preview_push, reject_findings, send

    found = preview_push(folder, to, allow=tuple(allow or ()))
    if not as_json:
        _print(found, to, private)
    elif found.findings or not yes:
        emit_json(found.as_dict(to, private))
    reject_findings(found)
    if not yes:
        err.print("Nothing was sent. To send it, repeat the command with --yes.", soft_wrap=True)
        return
    sent = send(found, to, private=private, message=message or "")
    if as_json:
        emit_json(found.as_dict(to, private, sent))
    else:
        out.print(f"\nSent: {sent.url}", soft_wrap=True)


def _print(found: Preview, repo: str, private: bool) -> None:
    from rich.table import Table

    from arte_edge.cache import megabytes

    kind = "private if it is new" if private else "public if it is new"
    out.print(f"To {repo} ({kind}):\n", soft_wrap=True)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for name, size_bytes in found.files.items():
        table.add_row(name, megabytes(size_bytes))
    table.add_row(f"{len(found.files)} files", megabytes(found.size_bytes), style="bold")
    out.print(table)
    if found.excluded:
        out.print("\nNot sent:")
        for name, reason in found.excluded:
            out.print(f"  {name}: {reason}", soft_wrap=True)
    out.print("\nFront matter of the card:")
    for line in found.head.splitlines():
        out.print(f"  {line}", soft_wrap=True)

"""``arte-edge card``: write measured results into student.json, the model card and the GGUF files. Local only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arte_edge.console import emit_json, err, out

__all__ = ["card"]


def card(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="An export's folder, with student.json; or the run it belongs to."
        ),
    ],
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Hub id of the 16-bit student; default: its base, as a finetune of it."
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Hub id of published training data; may be repeated."),
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Licence; default: the base's.")
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option(metavar="USER/REPO", help="Repository it will be pushed to, for links to raw results."),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID:TASK",
            help="Write .eval_results for a benchmark of the Hub: openai/gsm8k:gsm8k[=TASK].",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write the 16-bit student's card there; DIR is not changed."),
    ] = None,
    allow_throttled: Annotated[
        bool, typer.Option("--allow-throttled", help="Include rates of a throttled device, marked so.")
    ] = False,
    gguf_keys: Annotated[
        bool,
        typer.Option("--gguf-keys/--no-gguf-keys", help="Write the results into the GGUF files' metadata."),
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and change nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the model card and metadata from the results.

    Writes or updates README.md, the GGUF files' metadata and student.json. Your own edits of the card are
    kept: only our results and the text between the arte-edge markers are replaced.
    """
    from arte_edge.publish.card.card import card as write

    done = write(
        folder,
        base_model=base_model or "",
        dataset=tuple(dataset or ()),
        license=license_ or "",
        repo=repo or "",
        benchmark=tuple(benchmark or ()),
        checkpoint=checkpoint,
        allow_throttled=allow_throttled,
        gguf_keys=gguf_keys,
        dry_run=dry_run,
    )
    if dry_run:
        emit_json({"card": done.text, "notes": done.notes}) if as_json else out.print(
            done.text, soft_wrap=True, end=""
        )
        return
    for text in done.notes:
        err.print(text, soft_wrap=True)
    if as_json:
        emit_json({"folder": str(done.folder), "changed": list(done.changed), "notes": list(done.notes)})
    elif done.changed:
        for name in done.changed:
            out.print(f"wrote {name}", soft_wrap=True)
    else:
        out.print("Nothing to change: card and files are up to date.")

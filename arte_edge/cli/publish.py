"""``arte-edge card | push | recommend | report``: what is told of a run or of exported files.

Only push sends anything, and only with ``--yes``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arte_edge.console import emit_json, err, out
from arte_edge.console import out as stdout
from arte_edge.errors import ArteError

if TYPE_CHECKING:
    from arte_edge.publish.hub import Preview
    from arte_edge.publish.recommend.recommendation import Recommendation


def card(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="An export's folder, with student.json; or the run it belongs to.")
    ],
    base_model: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Hub id of the 16-bit student; default: its base, as a finetune of it."),
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Hub id of published training data; may be repeated.")
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Licence; default: the base's.")
    ] = None,
    repo: Annotated[
        str | None, typer.Option(metavar="USER/REPO", help="Repository it will be pushed to, for links to raw results.")
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID:TASK", help="Write .eval_results for a benchmark of the Hub: openai/gsm8k:gsm8k[=TASK]."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the 16-bit student's card there; DIR is not changed.")
    ] = None,
    allow_throttled: Annotated[
        bool, typer.Option("--allow-throttled", help="Include rates of a throttled device, marked so.")
    ] = False,
    gguf_keys: Annotated[
        bool, typer.Option("--gguf-keys/--no-gguf-keys", help="Write the results into the GGUF files' metadata.")
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
        emit_json({"card": done.text, "notes": done.notes}) if as_json else out.print(done.text, soft_wrap=True, end="")
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


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="An export's folder, or a checkpoint's, with its card.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="USER/REPO", help="Repository on the Hub; created if missing.")],
    yes: Annotated[bool, typer.Option("--yes", help="Send it. Without this nothing leaves the machine.")] = False,
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


def recommend(
    source: Annotated[
        str, typer.Argument(metavar="RUN|FOLDER", help="A run's folder or name, or a folder with student.json.")
    ],
    device: Annotated[
        str | None, typer.Option(help="Profile (see `arte-edge devices ls`) or fingerprint; default: this machine.")
    ] = None,
    max_ram: Annotated[str | None, typer.Option(metavar="SIZE", help="Maximum peak memory: 1GB, 512MiB.")] = None,
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


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name under runs/.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Output file; default: RUN/report.html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: the path and what is missing.")] = False,
) -> None:
    """Write a report on a run as one HTML page.

    Charts are inline, nothing is loaded from the network. A run that is not finished, or was not exported or
    measured yet, has a report too, which lists what is missing.
    """
    from arte_edge import api

    page = api.report(run, out=out)
    if as_json:
        emit_json({"report": str(page.path), "missing": list(page.missing)})
        return
    for line in page.missing:
        stdout.print(f"not included: {line}", soft_wrap=True)
    stdout.print(f"wrote {page.path}", soft_wrap=True)

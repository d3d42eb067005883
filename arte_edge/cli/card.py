"""``arte-edge card``: put what was measured into student.json, the model card and the GGUF files. Nothing leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arte_edge.console import emit_json, err, out
from arte_edge.errors import InputError

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
        str | None, typer.Option(metavar="USER/REPO", help="Where it will be, for links to the raw results.")
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
        typer.Option(
            metavar="FOLDER", help="Write the 16-bit student's card there, and change nothing in DIR."
        ),
    ] = None,
    allow_throttled: Annotated[
        bool, typer.Option("--allow-throttled", help="Tell rates of a throttled device too, marked so.")
    ] = False,
    gguf_keys: Annotated[
        bool,
        typer.Option("--gguf-keys/--no-gguf-keys", help="Write the results into the GGUF files' metadata."),
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and change nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write or update README.md, the GGUF files' metadata and student.json from what was measured.

    A card that you edited keeps your words: only our results and what stands between
    the arte-edge markers are replaced.
    """
    from arte_edge.publish.card import CARD, CardOptions, render_card, write_card
    from arte_edge.publish.card_head import hub_id
    from arte_edge.publish.eval_results import parse_benchmark, write_eval_results
    from arte_edge.publish.gguf_meta import write_keys
    from arte_edge.publish.where import find_export, read_bench, read_export
    from arte_edge.results.merge import merge_into, merge_rows

    for flag, ids in (("--base-model", [base_model]), ("--dataset", dataset or []), ("--repo", [repo])):
        for name in filter(None, ids):
            if hub_id(name) != name:
                raise InputError(f"{flag} {name}: no id of the Hub", "It has the form user/name.")
    options = CardOptions(
        base_model or "",
        tuple(dataset or ()),
        license_ or "",
        repo or "",
        allow_throttled,
        checkpoint is not None,
    )
    benchmarks = [parse_benchmark(text) for text in benchmark or ()]
    path = find_export(folder)
    target = checkpoint or path
    if not target.is_dir():
        raise InputError(f"{target}: no such folder", "Give the folder of the 16-bit checkpoint.")
    notes: list[str] = []
    rows = read_bench(path)
    if dry_run:
        merged = merge_into(read_export(path), rows)
        there = target / CARD
        before = there.read_bytes().decode("utf-8", errors="replace") if there.is_file() else None
        text = render_card(merged.student, options, before)
        emit_json({"card": text, "notes": merged.notes}) if as_json else out.print(
            text, markup=False, soft_wrap=True, end=""
        )
        return
    changed: list[str] = []
    student = read_export(path)
    if checkpoint is None:
        merged_student = merge_rows(path, rows, note=notes.append)
        if merged_student != student:
            changed.append("student.json")
        student = merged_student
        done = write_eval_results(path, student, benchmarks, repo=options.repo, note=notes.append)
        if gguf_keys:
            changed += write_keys(path, allow_throttled=allow_throttled, note=notes.append)
            student = read_export(path)
        changed += [file.relative_to(path).as_posix() for file in done]
    else:
        student = merge_into(student, rows).student
    if write_card(target, student, options).changed:
        changed.append(CARD)
    for text in notes:
        err.print(text, markup=False, soft_wrap=True)
    if as_json:
        emit_json({"folder": str(target), "changed": changed, "notes": notes})
    elif changed:
        for name in changed:
            out.print(f"wrote {name}", markup=False, soft_wrap=True)
    else:
        out.print("Nothing to change: the card and the files say it all.", markup=False)

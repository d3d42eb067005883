"""``arte-edge tasks``: list, show, check and create tasks.

Examples come from the seed split; the test split is counted, never shown.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arte_edge import catalog
from arte_edge.console import emit_json, err, out
from arte_edge.errors import InputError
from arte_edge.files import user_path

if TYPE_CHECKING:
    from arte_edge.tasks.task import Task
    from arte_edge.tasks.validation import Problem

__all__ = ["app"]

app = typer.Typer(help="List, show, check and create tasks.", no_args_is_help=True)

Bbh = Annotated[
    Path | None,
    typer.Option("--bbh", metavar="DIR", help="Use tasks from a folder of BIG-Bench Hard files."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("ls")
def ls(bbh: Bbh = None, as_json: Json = False) -> None:
    """List shipped tasks, or those of a BIG-Bench Hard folder."""
    from arte_edge.tasks.loaders import load_task

    tasks = [_summary(load_task(name, bbh=bbh)) for name in _names(bbh)]
    if as_json:
        emit_json(tasks)
        return
    rows = [("task", "answer", "rows", "description")]
    for task in tasks:
        sizes = "/".join(str(n) for n in task["n_rows"].values())
        rows.append((task["name"], task["answer"]["kind"], sizes, task["description"]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    left = max(out.width - sum(widths) - 2 * len(widths), 1)  # two blanks between columns
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        out.print("  ".join([*cells, shorten(row[3], left, placeholder="…")]), no_wrap=True)
    err.print("rows: seed / validation / test")


@app.command("show")
def show(
    ref: Annotated[str, typer.Argument(help="A shipped name, a task folder, data.jsonl or hub:org/name.")],
    n_examples: Annotated[int, typer.Option("--examples", "-n", min=0, help="Number of seed examples.")] = 3,
    bbh: Bbh = None,
    as_json: Json = False,
) -> None:
    """Show a task: description, answers, techniques, examples."""
    from arte_edge.tasks.loaders import load_task

    task = load_task(ref, bbh=bbh)
    summary = _summary(task) | {
        "techniques": list(task.techniques),
        "examples": [asdict(example) for example in task.seed[:n_examples]],
        "notes": list(task.notes),
    }
    if as_json:
        emit_json(summary)
        return
    choices = f" ({', '.join(task.answer.choices)})" if task.answer.choices else ""
    sizes = ", ".join(f"{n} {split}" for split, n in summary["n_rows"].items())
    seed = "" if task.split_seed is None else f" (split by seed {task.split_seed})"
    lines = [
        task.name,
        task.description,
        "",
        f"answer   {task.answer.kind}{choices}",
        f"rows     {sizes}{seed}",
    ]
    lines.append(f"sha256   {task.sha256[:16]}…")
    lines += [f"note     {note}" for note in task.notes]
    for number, technique in enumerate(task.techniques, start=1):
        lines += ["", f"technique {number}: {technique}"]
    for example in task.seed[:n_examples]:
        lines += ["", f"input    {example.input}", f"target   {example.target}"]
    out.print("\n".join(lines))


@app.command("check")
def check(
    refs: Annotated[
        list[str] | None, typer.Argument(help="Tasks to check. Default: all shipped ones.")
    ] = None,
    bbh: Bbh = None,
    as_json: Json = False,
) -> None:
    """Check tasks and list all problems.

    Exit code 2 if there are any.
    """
    reports = [_report(ref, bbh) for ref in refs or _names(bbh)]
    if as_json:
        emit_json(reports)
    else:
        for report in reports:
            _print_report(report)
    if bad := [report["task"] for report in reports if report["problems"]]:
        n_problems = sum(len(report["problems"]) for report in reports)
        raise InputError(f"{n_problems} problems in {', '.join(bad)}", "See the list above.")


@app.command("new")
def new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The task folder to write.")],
    jsonl: Annotated[
        Path | None, typer.Option("--jsonl", metavar="FILE", help="Split this labelled file into the task.")
    ] = None,
    hub: Annotated[
        str | None, typer.Option("--hub", metavar="ORG/NAME", help="Split this Hub dataset into the task.")
    ] = None,
    input_column: Annotated[str, typer.Option("--input", help="Column of the input.")] = "input",
    target_column: Annotated[str, typer.Option("--target", help="Column of the correct answer.")] = "target",
    split_seed: Annotated[int, typer.Option("--seed", help="Seed of the split.")] = 0,
    description: Annotated[str, typer.Option("--description", help="Description of the task.")] = "",
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="MODEL", help="Let this model propose the technique prompts."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a task folder, empty or from a labelled file.

    With --teacher, a model proposes the four technique prompts, for a new or an existing task.
    """
    from arte_edge.tasks.from_table import task_from_table
    from arte_edge.tasks.loaders import hub_records, jsonl_records, task_name
    from arte_edge.tasks.scaffold import check_empty, write_skeleton, write_task

    if jsonl and hub:
        raise InputError("--jsonl and --hub exclude each other")
    folder = user_path(folder)
    filled_in = (folder / "task.toml").is_file()
    if teacher and not (jsonl or hub or filled_in):
        hint = "Add --jsonl FILE, or create the folder without --teacher, fill it in and run this again."
        raise InputError("A teacher needs a description and seed examples to propose techniques", hint)
    name = task_name(folder.resolve().name)
    if jsonl or hub:
        check_empty(folder)
        records = (
            jsonl_records(jsonl, input_column, target_column)
            if jsonl
            else hub_records(hub or "", input_column, target_column)
        )
        task = task_from_table(name, records, split_seed=split_seed, description=description)
        write_task(folder, task)
        for note in task.notes:
            err.print(note)
    elif not teacher:
        write_skeleton(folder, name, description)
    techniques = _propose(folder, teacher) if teacher else ()
    if as_json:
        emit_json({"folder": str(folder), "name": name, "techniques": list(techniques)})
        return
    for technique in techniques:
        out.print(f"- {technique}")
    out.print(f"Wrote {folder}. Next: fill in task.toml, then `arte-edge tasks check {folder}`.")


def _propose(folder: Path, teacher: str) -> tuple[str, ...]:
    from arte_edge.runtimes.loader import open_engine
    from arte_edge.tasks.folder import load_folder
    from arte_edge.tasks.scaffold import propose_techniques, set_techniques

    task = load_folder(folder, techniques_required=False)
    engine = open_engine(teacher)
    try:
        techniques = propose_techniques(engine, task.description, task.seed)
    finally:
        engine.close()
    set_techniques(folder, techniques)
    return techniques


def _names(bbh: Path | None) -> list[str]:
    from arte_edge.tasks.loaders import bbh_names

    return catalog.names("tasks") if bbh is None else bbh_names(bbh)


def _summary(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "description": task.description,
        "answer": task.answer.model_dump(mode="json"),
        "n_rows": {
            "seed": len(task.seed),
            "validation": len(task.validation),
            "test": len(task.test_keys()),
        },
        "split_seed": task.split_seed,
        "sha256": task.sha256,
    }


def _report(ref: str, bbh: Path | None) -> dict[str, Any]:
    """Return the problems of a task, and warnings about its data as `remarks`."""
    from arte_edge.tasks.folder import read_folder
    from arte_edge.tasks.loaders import find_folder, load_task
    from arte_edge.tasks.validation import quality_warnings

    task: Task | None
    problems: list[Problem] = []
    try:
        if folder := None if bbh else find_folder(ref):
            task, problems = read_folder(folder)
        else:
            task = load_task(ref, bbh=bbh)
    except InputError as error:
        return {"task": ref, "problems": [{"where": "", "what": error.message, "hint": error.hint}]}
    report: dict[str, Any] = {"task": ref, "problems": [asdict(problem) for problem in problems]}
    if task:
        report |= {
            "n_rows": _summary(task)["n_rows"],
            "sha256": task.sha256,
            "remarks": quality_warnings(task),
        }
    return report


def _print_report(report: dict[str, Any]) -> None:
    if not report["problems"]:
        sizes = "/".join(str(n) for n in report["n_rows"].values())
        out.print(f"{report['task']}: ok, {sizes} rows")
    for problem in report["problems"]:
        where = f"{problem['where']}: " if problem["where"] else ""
        out.print(f"{report['task']}: {where}{problem['what']}", soft_wrap=True)
        if problem["hint"]:
            out.print(f"    {problem['hint']}", soft_wrap=True)
    for remark in report.get("remarks", ()):
        out.print(f"    {remark}", soft_wrap=True)

"""``arte-edge tasks``: list, show, check and create tasks.

Examples come from the seed split; the test split is counted, never shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arte_edge import catalog
from arte_edge.console import emit_json, err, out
from arte_edge.errors import InputError
from arte_edge.files import user_path

if TYPE_CHECKING:
    from arte_edge.tasks.scaffold import NewTask
    from arte_edge.tasks.task import Problem, Task

_LABELS_SHOWN = 20

app = typer.Typer(help="List, show, check and create tasks.", no_args_is_help=True)

Bbh = Annotated[
    Path | None, typer.Option("--bbh", metavar="DIR", help="Use tasks from a folder of BIG-Bench Hard files.")
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
    _print_columns(rows, wide=3)
    err.print("rows: seed / validation / test")


def _print_columns(rows: Sequence[Sequence[object]], wide: int) -> None:
    """Print `rows` in columns, numbers to the right; column `wide` is cut to the width of the terminal."""
    from rich.cells import cell_len, set_cell_size

    texts = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*texts, strict=True)]
    widths[wide] -= max(0, sum(widths) + 2 * len(widths) - 2 - out.width)
    numbers = [isinstance(cell, int) for cell in rows[-1]]
    for row in texts:
        cells = zip(row, widths, numbers, strict=True)
        line = "  ".join(text.rjust(n) if right else set_cell_size(text, n) for text, n, right in cells)
        out.print(line.rstrip(), soft_wrap=True)


@app.command("show")
def show(
    ref: Annotated[str, typer.Argument(help="A shipped name, a task folder, data.csv or hub:org/name.")],
    n_examples: Annotated[int, typer.Option("--examples", "-n", min=0, help="Number of seed examples.")] = 3,
    bbh: Bbh = None,
    as_json: Json = False,
) -> None:
    """Show a task: description, answers, techniques, examples."""
    from arte_edge.tasks.loaders import load_task

    task = load_task(ref, bbh=bbh)
    summary = _summary(task) | {
        "techniques": list(task.techniques),
        "examples": [{"input": one.input, "target": one.target} for one in task.seed[:n_examples]],
        "notes": list(task.notes),
    }
    if as_json:
        emit_json(summary)
        return
    choices = f" ({', '.join(task.answer.choices)})" if task.answer.choices else ""
    sizes = ", ".join(f"{n} {split}" for split, n in summary["n_rows"].items())
    seed = "" if task.split_seed is None else f" (split by seed {task.split_seed})"
    lines = [task.name, task.description, "", f"answer   {task.answer.kind}{choices}"]
    lines += [f"rows     {sizes}{seed}", f"sha256   {task.sha256[:16]}…"]
    lines += [f"note     {note}" for note in task.notes]
    for number, technique in enumerate(task.techniques, start=1):
        lines += ["", f"technique {number}: {technique}"]
    for example in task.seed[:n_examples]:
        lines += ["", f"input    {example.input}", f"target   {example.target}"]
    out.print("\n".join(lines))


@app.command("check")
def check(
    refs: Annotated[list[str] | None, typer.Argument(help="Tasks to check. Default: all shipped ones.")] = None,
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
    table: Annotated[
        Path | None,
        typer.Option(
            "--table",
            "--jsonl",
            metavar="FILE",
            help="Split this labelled table into the task: .csv, .tsv, .jsonl, .json or .parquet.",
        ),
    ] = None,
    hub: Annotated[
        str | None, typer.Option("--hub", metavar="ORG/NAME", help="Split this Hub dataset into the task.")
    ] = None,
    input_column: Annotated[
        str | None, typer.Option("--input", help="Column of the input. Default: guessed by its name.")
    ] = None,
    target_column: Annotated[
        str | None, typer.Option("--target", help="Column of the answer. Default: guessed by its name.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option("--rows", min=1, help="Use at most so many rows.")] = None,
    split_seed: Annotated[int, typer.Option("--seed", help="Seed of the split.")] = 0,
    description: Annotated[str, typer.Option("--description", help="Description of the task.")] = "",
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="MODEL", help="Let this model propose the technique prompts.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a task folder, empty or from a labelled table.

    With --teacher, a model proposes the four technique prompts, for a new or an existing task.
    """
    from arte_edge.tasks.from_table import Split
    from arte_edge.tasks.loaders import task_name
    from arte_edge.tasks.scaffold import new_task, write_skeleton

    if table and hub:
        raise InputError("--table and --hub exclude each other")
    folder = user_path(folder)
    if teacher and not (table or hub or (folder / "task.toml").is_file()):
        hint = "Add --table FILE, or create the folder without --teacher, fill it in and run this again."
        raise InputError("A teacher needs a description and seed examples to propose techniques", hint)
    written: dict[str, Any] = {"folder": str(folder), "name": task_name(folder.resolve().name)}
    todo = "fill in task.toml"
    if table or hub:
        ref, columns = str(table or f"hub:{hub}"), (input_column, target_column)
        made = new_task(folder, ref, columns, Split(split_seed, max_rows), description)
        todo = "read task.toml, whose prompts are general ones" if not description else "read task.toml"
        written |= _summary(made.task) | {"notes": list(made.task.notes), "labels": made.spread}
        if not as_json:
            _print_new(made)
    elif not teacher:
        write_skeleton(folder, written["name"], description)
    techniques = _propose(folder, teacher) if teacher else ()
    if as_json:
        emit_json(written | {"techniques": list(techniques)})
        return
    for technique in techniques:
        out.print(f"- {technique}")
    out.print(f"Wrote {folder}. Next: {todo}, then", f"`arte-edge tasks check {folder}`.")


def _print_new(made: NewTask) -> None:
    """Print what was read, dropped and guessed, and how the answers are spread over the splits."""
    task, table = made.task, made.table
    columns = f"input '{table.columns[0]}', answer '{table.columns[1]}'"
    form = f" {table.form}" if table.form else ""
    out.print(f"Read {table.name}: {table.n_rows:,} rows{form}; {columns}.")
    for note in task.notes:
        out.print(f"- {note}")
    kind = f"one of {len(task.answer.choices)} labels" if task.answer.choices else task.answer.kind
    how = ", compared as written" if task.answer.exact else ""
    out.print(f"Answers: {kind}{how}; none merged.")
    rows: list[tuple[object, ...]] = [("answer", "seed", "validation", "test")]
    rows += [(label, *n.values()) for label, n in list(made.spread.items())[:_LABELS_SHOWN]]
    if (more := len(made.spread) - _LABELS_SHOWN) > 0:
        rows.append((f"… and {more} more", "", "", ""))
    _print_columns([*rows, ("(all)", *_summary(task)["n_rows"].values())], wide=0)
    if unseen := [label for label, n in made.spread.items() if not n["validation"]]:
        names = ", ".join(unseen[:5]) + (", …" if len(unseen) > 5 else "")
        out.print(f"No validation row for {len(unseen)} of the answers: {names}")


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
        "n_rows": {"seed": len(task.seed), "validation": len(task.validation), "test": len(task.test_keys())},
        "split_seed": task.split_seed,
        "sha256": task.sha256,
    }


def _report(ref: str, bbh: Path | None) -> dict[str, Any]:
    """Return the problems of a task, and warnings about its data as `remarks`."""
    from arte_edge.tasks.folder import read_folder
    from arte_edge.tasks.loaders import find_folder, load_task
    from arte_edge.tasks.task import quality_warnings

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
        report |= {"n_rows": _summary(task)["n_rows"], "sha256": task.sha256, "remarks": quality_warnings(task)}
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

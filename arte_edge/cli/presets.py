"""``arte-edge ls | show | copy | check``: run files, shipped presets or the user's own.

A preset is an ordinary run file with an explaining comment. `check` finds problems without downloading models.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer

from arte_edge import catalog
from arte_edge.cache import write_atomic
from arte_edge.console import emit_json, out
from arte_edge.errors import InputError
from arte_edge.files import user_path

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="Name of a shipped preset, path of a run file, or a run's folder.")]


def ls(as_json: Json = False) -> None:
    """List the shipped presets (run files to start from)."""
    presets = [_summary(name) for name in catalog.names("presets")]
    if as_json:
        emit_json(presets)
        return
    for preset in presets:
        out.print(f"{preset['name']:<12}{preset['description']}", soft_wrap=True)
        models = f"{preset['student']} learns {preset['task']} from {preset['teacher']}"
        out.print(f"{'':<12}{shorten(models, 200, placeholder='…')}", soft_wrap=True)


def show(name: Name, as_json: Json = False) -> None:
    """Print a run file with its comments.

    With --json, all keys with their resolved values.
    """
    from arte_edge.distill.config import build, load_toml

    path = catalog.find("presets", name)
    if as_json:
        emit_json(build(name, load_toml(path)).model_dump(mode="json"))
    else:
        out.print(_read(path).rstrip(), soft_wrap=True)


def copy(
    name: Name,
    dest: Annotated[Path, typer.Argument(metavar="DEST.toml", help="File to write; it must not exist.")],
    as_json: Json = False,
) -> None:
    """Copy a preset to a new file.

    An existing file is not overwritten.
    """
    text, dest = _read(catalog.find("presets", name)), user_path(dest)
    if dest.suffix != ".toml":
        raise InputError(f"{dest}: a run file ends in .toml", f"For example {dest}.toml.")
    if dest.exists():
        raise InputError(f"{dest}: exists already", "Choose another name, or remove it first.")
    if not dest.absolute().parent.is_dir():
        raise InputError(f"{dest}: there is no such folder")
    write_atomic(dest, text.encode())
    if as_json:
        emit_json({"preset": name, "file": str(dest)})
        return
    out.print(f"Wrote {dest}. Next: edit it, `arte-edge check {dest}`, `arte-edge distill {dest}`.")


def check(
    ref: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="A run file, the name of a shipped preset, or a run's folder.")
    ],
    as_json: Json = False,
) -> None:
    """Check a run file: keys, values, task, models.

    Lists all problems; exit code 2 if there are any. Downloads no model; Hub ids are not checked.
    """
    from arte_edge.distill.config import load_toml
    from arte_edge.distill.validate_config import find_problems

    tables = load_toml(catalog.find("presets", ref))
    problems = find_problems(tables)
    if as_json:
        emit_json({"run": ref, "problems": [{"what": what, "hint": hint} for what, hint in problems]})
    else:
        for what, hint in problems:
            out.print(f"{ref}: {what}", soft_wrap=True)
            if hint:
                out.print(f"    {hint}", soft_wrap=True)
    if problems:
        raise InputError(f"{ref}: {len(problems)} problem{'s' * (len(problems) > 1)}", "See the list above.")
    if not as_json:
        out.print(f"{ref}: ok")


def _summary(name: str) -> dict[str, Any]:
    from arte_edge.distill.config import build, load_toml

    path = catalog.find("presets", name)
    config = build(name, load_toml(path))
    return {
        "name": name,
        "description": catalog.describe(_read(path)),
        "task": config.task.ref,
        "teacher": config.teacher.model,
        "student": config.student.model,
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error

"""Find a run or an export by name or path, and read its ``student.json`` and ``bench.jsonl``."""

from __future__ import annotations

from pathlib import Path

from arte_edge.errors import InputError
from arte_edge.files import run_file, user_path
from arte_edge.results.rows import BENCH_NAME, Row, read_rows
from arte_edge.results.student_json import FILE_NAME, StudentFile, read_student


def find_run(ref: str | Path, runs: str | Path = "runs") -> Path:
    """Return the folder of a run: a path, or a name in the folder `runs`.

    Raises InputError: there is no such folder, or it holds no run.
    """
    path = user_path(ref)
    path = path if path.is_dir() else user_path(Path(runs) / ref)
    if not path.is_dir():
        raise InputError(f"{ref}: no such folder", "Give a run's folder, or its name under runs/.")
    return run_file(path).parent


def find_export(ref: str | Path) -> Path:
    """Return the folder that holds ``student.json``: `ref` itself, its ``export``, or the only one below it.

    Raises InputError: there is none, or there are several.
    """
    path = user_path(ref)
    if not path.exists() and (Path("runs") / path).is_dir():
        path = Path("runs") / path
    if path.is_file() and path.name in (FILE_NAME, BENCH_NAME):
        return path.parent
    for folder in (path, path / "export"):
        if (folder / FILE_NAME).is_file():
            return folder
    below = sorted(path.glob(f"*/{FILE_NAME}"))
    if len(below) == 1:
        return below[0].parent
    if below:
        names = ", ".join(found.parent.name for found in below)
        raise InputError(f"{path}: several exports: {names}", "Name one of them.")
    raise InputError(f"{ref}: no {FILE_NAME} here", "Make files first: arte-edge export RUN.")


def read_export(folder: Path) -> StudentFile:
    """Return ``student.json`` of `folder`. Raises InputError: it is missing, damaged, or of another version."""
    if (student := read_student(folder)) is None:
        raise InputError(f"{folder}: no {FILE_NAME} here", "Make files first: arte-edge export RUN.")
    return student


def read_bench(folder: Path) -> list[Row]:
    """Return the rows of ``bench.jsonl`` in `folder`; none if nothing was measured yet.

    Raises InputError: the rows are of another version.
    """
    return read_rows(folder / BENCH_NAME)

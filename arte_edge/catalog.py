"""Find shipped files: tasks, presets, models, recipes, profiles.

In an installed wheel they are in ``arte_edge/_data/<kind>``, in a checkout in sibling folders of the package. A
reference with a ``/`` or that ends in ``.toml`` is a path; anything else is a shipped name. Where a preset is
expected, a run's folder stands for its ``run.toml``.
"""

from __future__ import annotations

from pathlib import Path

from arte_edge.errors import InputError, nearest
from arte_edge.files import run_file, user_path

_PACKAGE = Path(__file__).parent

# kind -> its folder in the package, or in the checkout (in a wheel: _data/<kind>)
KINDS = {
    "tasks": _PACKAGE / "tasks" / "data",
    "presets": _PACKAGE / "distill" / "presets",
    "models": _PACKAGE / "models" / "registry",
    "export": _PACKAGE.parent / "export",
    "devices": _PACKAGE.parent / "devices",
    "suites": _PACKAGE.parent / "benchmarks" / "suites",
}


def root(kind: str) -> Path:
    """Return the folder with the shipped files of `kind`."""
    shipped = _PACKAGE / "_data" / kind
    return shipped if shipped.is_dir() else KINDS[kind]


def names(kind: str) -> list[str]:
    """Return the shipped names of `kind`, sorted: ``*.toml`` stems, or folders with a ``task.toml``."""
    folder = root(kind)
    if kind == "tasks":
        return sorted(p.parent.name for p in folder.glob("*/task.toml"))
    return sorted(p.stem for p in folder.glob("*.toml"))


def find(kind: str, ref: str) -> Path:
    """Return the path of `ref`, a shipped name or a path.

    Raises InputError: no such file or name; the hint gives the nearest shipped name.
    """
    runs = kind == "presets" and ref not in names(kind) and user_path(ref).is_dir()
    if runs or "/" in ref or ref.endswith(".toml") or ref in (".", ".."):
        path = user_path(ref)
        if kind == "presets" and path.is_dir():
            return run_file(path)
        if path.is_dir() and kind != "tasks":
            raise InputError(
                f"{ref}: a folder, not a file", f"Name the .toml file, or one of: {', '.join(names(kind))}."
            )
        if path.exists():
            return path
        raise InputError(f"{ref}: no such file or folder", f"Shipped {kind}: {', '.join(names(kind))}.")
    if ref in names(kind):
        folder = root(kind)
        return folder / ref if kind == "tasks" else folder / f"{ref}.toml"
    what = kind.removesuffix("s")
    raise InputError(f"No shipped {what} is named '{ref}'", nearest(ref, names(kind)))


def describe(text: str) -> str:
    """Return the first sentence of a TOML file's opening comment, without the line with the command."""
    lines: list[str] = []
    for line in text.splitlines():
        comment = line.removeprefix("#").strip()
        if not line.startswith("#") or (lines and not comment):
            break
        if comment and not comment.startswith("arte-edge "):
            lines.append(comment)
    first, _, _ = " ".join(lines).partition(". ")
    return f"{first.rstrip('.')}." if first else ""

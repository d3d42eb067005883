"""From a reference to a task, whatever kind of reference it is."""

from __future__ import annotations

from pathlib import Path

from arte_edge import catalog
from arte_edge.tasks.folder import load_folder
from arte_edge.tasks.task import Task

__all__ = ["load_task"]


def load_task(ref: str, *, bbh: Path | None = None) -> Task:
    """Load the task that `ref` names: a shipped name, or the path of a task folder.

    Raises:
        InputError: there is no such task, or something in it is wrong.
    """
    return load_folder(catalog.find("tasks", ref))

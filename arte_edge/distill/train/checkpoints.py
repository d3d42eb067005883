"""The state from which a killed training resumes.

    .<out>.work/
        request         which training this is; another one starts over
        checkpoints/    the trainer's, each with a `complete` mark that is written last
        adapters/       DPO: the adapters that were checked
        probes.jsonl    DPO: the results of the checks

A checkpoint without its mark is incomplete and is deleted. The result
appears under its own name by one rename, and the folder is removed after that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from arte_edge.cache import rename_into_place, write_atomic
from arte_edge.errors import InputError
from arte_edge.files import json_loads

_MARK = "complete"
Result = TypeVar("Result")


class Workspace:
    """The work folder of one training, and the place of its result."""

    def __init__(self, out: Path, request: str) -> None:
        self.out, self._request = out, request
        self.folder = out.with_name(f".{out.name}.work")
        mark = self.folder / "request"
        known = mark.read_text(encoding="utf-8", errors="replace") if mark.is_file() else ""
        if known != request:
            shutil.rmtree(self.folder, ignore_errors=True)
            write_atomic(mark, request.encode())

    def described(self) -> dict[str, str]:
        """Return what opens this workspace in another process."""
        return {"out": str(self.out), "request": self._request}

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def mark(self, step: int) -> None:
        """Mark the checkpoint of `step` as complete."""
        write_atomic(self.checkpoints / f"checkpoint-{step}" / _MARK, b"")

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint; delete incomplete ones."""
        whole: list[Path] = []
        for folder in self.checkpoints.glob("checkpoint-*"):
            if (folder / _MARK).exists():
                whole.append(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)

    def finish(self, staged: Path, report: dict[str, Any]) -> None:
        """Move `staged` to the place of the result, with its report, and remove the work folder."""
        document = json.dumps({"request": self._request, **report}, indent=1, ensure_ascii=False)
        write_atomic(staged / "training.json", document.encode())
        shutil.rmtree(self.out, ignore_errors=True)
        rename_into_place(staged, self.out)
        shutil.rmtree(self.folder, ignore_errors=True)


def finished(out: Path, request: str, read: Callable[[Path, dict[str, Any]], Result]) -> Result | None:
    """Return the result of the same training that already exists; `read` makes it of its folder and report.

    Raises InputError: `out` was not written by a training, or its report is damaged.
    """
    if not out.exists():
        return None
    try:
        report = dict(json_loads((out / "training.json").read_bytes()))
        return read(out, report) if report.pop("request", None) == request else None
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{out}: exists and is not the result of a training, or its training.json is damaged",
            "Choose another folder, or remove this one.",
        ) from error

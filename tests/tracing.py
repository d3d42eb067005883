"""Which files of the package run on the way to a result, and which ones docs/architecture.md names for it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType

import arte_edge

PACKAGE = Path(arte_edge.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
# Used by everything: errors, output, atomic files, statistics of a summary, an example of a task.
GROUND_FLOOR = set(
    [
        "errors",
        "catalog",
        "extras",
        "machine",
        "console",
        "store",
        "cache",
        "stats",
        "pii_scan",
        "tasks/task",
        "files",
        "cli/interrupt",
        "__init__",
    ]
)


@contextmanager
def files_run(found: set[str]) -> Iterator[None]:
    """Collect the files whose functions run in this block, and those of the callers that wait for it."""

    def note(frame: FrameType) -> None:
        code = frame.f_code
        # Only functions: the bodies of modules and classes run when they are imported, and tables made there.
        if (
            code.co_flags & CO_OPTIMIZED
            and not code.co_name.endswith("comp>")
            and code.co_filename.startswith(f"{PACKAGE}/")
        ):
            found.add(Path(code.co_filename).relative_to(PACKAGE).with_suffix("").as_posix())

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        note(frame)
        frame = frame.f_back
    sys.setprofile(lambda frame, event, _: note(frame) if event == "call" else None)
    try:
        yield
    finally:
        sys.setprofile(None)
        found -= GROUND_FLOOR


def documented(title: str) -> set[str]:
    """Return the files that the page names for one path."""
    entry = re.search(rf"\*\*{re.escape(title)}\*\*(.*?)(?=\n- \*\*|\n\n)", PAGE.read_text("utf-8"), re.DOTALL)
    assert entry is not None, title
    return set(re.findall(r"`([a-z_/]+)`", entry[1]))

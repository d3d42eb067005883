"""Which files of the package run on the way from a command to its result: traced, not imported.

A file counts if one of its functions runs; module and class bodies, which run on import, do not. The modules
at the bottom of the package (errors, cache, console and the like, see `GROUND`) are what everything uses and
do not count. A child process is traced if it starts with `TRACE_TO` set and this folder on PYTHONPATH, where
``sitecustomize.py`` calls `trace_child`.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import arte_edge

__all__ = ["GROUND", "TRACE_TO", "documented", "traced"]

PACKAGE = str(Path(arte_edge.__file__).parent) + os.sep
TRACE_TO = "ARTE_EDGE_TEST_TRACE_TO"
GROUND = (
    *(
        "__init__",
        "__main__",
        "errors",
        "catalog",
        "extras",
        "private_names",
        "threads",
        "protobuf",
        "pii_scan",
    ),
    *("memory", "console", "notebook", "stats", "cache", "store"),
)
_FUNCTION = 1  # CO_OPTIMIZED: set for functions, not for module and class bodies


def _file(frame: FrameType) -> str | None:
    code = frame.f_code
    if not code.co_flags & _FUNCTION or not code.co_filename.startswith(PACKAGE):
        return None
    name = code.co_filename.removeprefix(PACKAGE).removesuffix(".py")
    return None if name in GROUND else name


@contextmanager
def traced() -> Iterator[set[str]]:
    """Yield the set of files that run inside the block, with those on the stack when it begins."""
    seen: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (name := _file(frame)):
            seen.add(name)

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if name := _file(frame):
            seen.add(name)
        frame = frame.f_back
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def trace_child() -> None:
    """Trace this whole process and write what ran into a file of its own below `TRACE_TO`."""
    running = traced()
    seen = running.__enter__()

    def write() -> None:
        running.__exit__(None, None, None)
        Path(os.environ[TRACE_TO], f"{os.getpid()}.txt").write_text("\n".join(sorted(seen)))

    atexit.register(write)


def documented(path: Path, title: str) -> list[str]:
    """Return the files that ``docs/architecture.md`` lists in the code block under the bold `title`."""
    block = path.read_text("utf-8").split(f"**{title}**", 1)[1].split("```", 2)[1]
    return sorted(block.removeprefix("text").split())

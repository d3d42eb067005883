"""Run an exporter in a child process, without network access, and report why it failed.

The exporters print a lot, keep gigabytes until they end, and read the Hub, shell settings and the git
repository around them. A child process frees the memory, its environment disables the network, and the end
of its log becomes the error message.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arte_edge.errors import ArteError

_WORKER = Path(__file__).with_name("worker.py")
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONIOENCODING": "utf-8",
    # The builder writes the commit of the surrounding repository into the model, which may be the user's own.
    "GIT_DIR": os.devnull,
}
_SHOWN_LINES = 12


def child_environment() -> dict[str, str]:
    """Return this process's environment with network access disabled for exporters."""
    return {**os.environ, **_OFFLINE}


def run_worker(job: Mapping[str, Any], folder: Path, *, python: str = sys.executable, what: str) -> None:
    """Run one job of `worker.py` in `python`, with its log in ``folder/log.txt``.

    `folder` is where the child works and puts its temporary files, `what` the subject of the error message.

    Raises ArteError: it failed; with the last lines of its log.
    """
    log_path = folder / "log.txt"
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {**child_environment(), "TMPDIR": str(temporary), "TEMP": str(temporary)}
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            [python, "-P", str(_WORKER)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        assert child.stdin is not None
        try:
            try:
                child.stdin.write(json.dumps(dict(job)).encode() + b"\n")
                child.stdin.flush()  # and left open: the child ends when this pipe closes
            except BrokenPipeError:
                pass  # it failed at start: see its log
            code = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            child.stdin.close()
    if code != 0:
        raise ArteError(f"{what} failed (exit {code}):\n{_log_tail(log_path)}", _hint(code))


def _log_tail(log: Path) -> str:
    """Return the last lines of a log, of progress bars only the last state."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    return "\n".join(["  " + line for line in lines if line.strip()][-_SHOWN_LINES:]) or "  no output"


def _hint(code: int) -> str:
    if code in (-9, 137):
        return (
            "The system killed it, most likely because memory ran out: close programs or use a smaller model."
        )
    return "Nothing was written. `arte-edge --debug` shows the traceback."

"""Starting an exporter in a process of its own, without the network, and telling why it failed.

The exporters are large programs that print a lot, keep gigabytes until they end, and read the
Hub, the shell's settings and the git repository they lie in. A child process gives the memory
back, its environment shuts the network out, and its last words become our error message.
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

__all__ = ["child_environment", "run_worker"]

_WORKER = Path(__file__).with_name("worker.py")
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONIOENCODING": "utf-8",
    # The builder stamps the model with the commit of the repository that it believes to lie in:
    # with an environment inside a checkout that is the user's own repository.
    "GIT_DIR": os.devnull,
}
_TOLD_LINES = 12


def child_environment() -> dict[str, str]:
    """Return this process's environment, with the network shut out of the exporters."""
    return {**os.environ, **_OFFLINE}


def run_worker(job: Mapping[str, Any], folder: Path, *, python: str = sys.executable, what: str) -> None:
    """Run one job of `worker.py` in `python`, with its log in ``folder/log.txt``, until it ends.

    Args:
        job: what the worker reads, see there.
        folder: where the child runs; its temporary files go there too.
        what: the subject of the error message, as in "The ONNX model builder".

    Raises:
        ArteError: it failed; with the last lines that it printed.
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
                child.stdin.flush()  # and left open: the child lives as long as this end does
            except BrokenPipeError:
                pass  # it died while starting: its log says why
            code = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            child.stdin.close()
    if code != 0:
        raise ArteError(f"{what} failed (exit {code}):\n{_last_words(log_path)}", _hint(code))


def _last_words(log: Path) -> str:
    """Return the last lines of a log; progress bars write over a line, and only their last state counts."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    return "\n".join(["  " + line for line in lines if line.strip()][-_TOLD_LINES:]) or "  it printed nothing"


def _hint(code: int) -> str:
    if code in (-9, 137):
        return (
            "The system ended it, most often for want of memory: close other programs or use a smaller model."
        )
    return "Nothing was written. `arte-edge --debug` shows where it was called from."

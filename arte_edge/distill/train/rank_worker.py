"""One rank of a training; `ranks.train_on_ranks` starts several of these. A module of its own: it is a program.

``python -m arte_edge.distill.train.rank_worker JOB.json STORE``, with RANK, WORLD_SIZE and LOCAL_RANK in the
environment; STORE is the file by which the ranks find each other.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from arte_edge.distill.train import dpo, sft
from arte_edge.distill.train.checkpoints import Workspace
from arte_edge.distill.train.collapse import ProbeResult
from arte_edge.distill.train.common import DpoSettings, SftSettings
from arte_edge.distill.train.ranks import is_main
from arte_edge.errors import ArteError, EngineError
from arte_edge.files import json_loads
from arte_edge.runtimes.transformers.placement import pick_device

_LONGEST_WAIT = timedelta(hours=6)  # of a rank for another, which may check the teacher meanwhile
_LONGEST_CHECK_S = 3 * 3600


class _Run:
    """The process that started this rank: lines to it, and its answers.

    Whatever else is written to this process's standard output goes to its log: a library's line without an end would
    make ours unreadable.
    """

    def __init__(self) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def say(self, **message: Any) -> None:
        os.write(self._out, f"\n{json.dumps({'arte_edge': message})}\n".encode())

    def probe(self, adapter: Path) -> ProbeResult:
        """Return what the run finds with an adapter. Raises EngineError: nothing within `_LONGEST_CHECK_S`."""
        self.say(probe=str(adapter))
        try:
            while (answer := self._answers.get(timeout=_LONGEST_CHECK_S))["adapter"] != adapter.name:
                pass
        except queue.Empty:
            raise EngineError(
                f"The check of the teacher after {adapter.name} gave no result in {_LONGEST_CHECK_S // 3600} hours",
                "Run the same command again; fewer align.probe_prompts make a check shorter.",
            ) from None
        return ProbeResult(**answer["found"])

    def _read(self) -> None:
        # Not sys.stdin: a thread that holds its lock is fatal when the interpreter exits.
        rest = b""
        while block := os.read(0, 4096):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                self._answers.put(json_loads(line))
        os._exit(130)  # the run has ended


def main(path: Path, store: Path) -> int:
    """Train as the job in `path` says; return the exit code."""
    run = _Run()
    job: dict[str, Any] = json_loads(path.read_bytes())
    import torch
    from accelerate import PartialState

    if job.get("sharded"):
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    device = pick_device().type
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    n, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    found = torch.distributed.FileStore(str(store), n)  # type: ignore[attr-defined]
    PartialState(cpu=device == "cpu", timeout=_LONGEST_WAIT, store=found, rank=rank, world_size=n)
    workspace = Workspace(Path(job["out"]), job["request"])

    def progress(done: int, total: int) -> None:
        if is_main():
            run.say(step=done, of=total)

    checkpoint, settings = Path(job["checkpoint"]), job["settings"]
    try:
        if job["kind"] == "sft":
            sft.train_here(checkpoint, job["rows"], SftSettings(**settings), workspace, progress)
        else:
            dpo.train_here(
                checkpoint,
                job["pairs"],
                job["held_out"],
                DpoSettings(**settings),
                workspace,
                run.probe if job["probed"] else None,
                progress,
            )
    except ArteError as error:
        if is_main():
            run.say(error=type(error).__name__, message=error.message, hint=error.hint)
        return error.exit_code
    finally:
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))

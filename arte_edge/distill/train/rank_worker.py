"""One rank of a training; `ranks.train_on_ranks` starts several of these. A module of its own: it is a program.

``python -m arte_edge.distill.train.rank_worker JOB.json``, with what torch's launcher sets in the environment.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from arte_edge.distill.train import dpo, sft
from arte_edge.distill.train.checkpoints import Workspace
from arte_edge.distill.train.collapse import ProbeResult
from arte_edge.distill.train.common import DpoSettings, SftSettings
from arte_edge.distill.train.ranks import answer_of, is_main, say
from arte_edge.errors import ArteError
from arte_edge.files import json_loads
from arte_edge.runtimes.transformers.placement import pick_device

_LONGEST_WAIT = timedelta(hours=6)  # of a rank for another, which may check the teacher meanwhile
_POLL_S = 0.1


def main(path: Path) -> int:
    """Train as the job in `path` says; return the exit code."""
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    job: dict[str, Any] = json_loads(path.read_bytes())
    import torch
    from accelerate import PartialState

    if job.get("sharded"):
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    device = pick_device().type
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    PartialState(cpu=device == "cpu", timeout=_LONGEST_WAIT)
    workspace = Workspace(Path(job["out"]), job["request"])

    def progress(done: int, total: int) -> None:
        if is_main():
            say({"step": done, "of": total})

    def probe(adapter: Path) -> ProbeResult:
        say({"probe": str(adapter)})
        while (answer := answer_of(workspace)) is None:
            time.sleep(_POLL_S)
        return ProbeResult(**answer)

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
                probe if job["probed"] else None,
                progress,
            )
    except ArteError as error:
        if is_main():
            say({"error": type(error).__name__, "message": error.message, "hint": error.hint})
        return error.exit_code
    finally:
        torch.distributed.destroy_process_group()
    return 0


def _end_with_the_run() -> None:
    # Not sys.stdin: a thread that holds its lock is fatal when the interpreter exits.
    while os.read(0, 4096):
        pass
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""One training on several processes (ranks) of this machine, each with a share of every batch.

The run stays one process: it holds the folder's lock, the store and the engines. For one training it starts the
ranks, waits, and takes their result. Each rank does what a single process would do (`sft.train_here`,
`dpo.train_here`); torch's DistributedDataParallel averages the gradients, and rank 0 alone writes. What only the run
can do, a check for collapse with the teacher's engine, rank 0 has it do: a line on its output names the adapter, a line
on its input gives the answer, which ends with the process that it is for.

The ranks find each other by a file and exchange gradients through sockets of the loopback interface. torch's launcher
would open a port on every interface, whose reader unpickles what anyone sends.

A step is the same as on one process: the examples of a step, in the same order, are dealt out to the ranks. Where
they do not come out even, a rank gets an example that counts nothing. A rank that is lost ends the others, and the
same command resumes from the last checkpoint; also on another number of processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from arte_edge import errors
from arte_edge.cache import write_atomic
from arte_edge.distill.train.checkpoints import Workspace
from arte_edge.errors import ArteError, InputError
from arte_edge.machine import thread_count
from arte_edge.store import parse_line

_WORKER = "arte_edge.distill.train.rank_worker"
_SHOWN_LINES = 6
_POLL_S, _GRACE_S = 0.1, 5.0  # how long the others may take to end by themselves, when one was lost
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
Value = TypeVar("Value")


def world_size() -> int:
    """Return the number of ranks of this training; 1 in a process that was not started as one of several."""
    import torch

    here = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if here else 1


def is_main() -> bool:
    """Return whether this process writes: the only one, or rank 0."""
    import torch

    return world_size() == 1 or torch.distributed.get_rank() == 0


def agreed(value: Value) -> Value:
    """Return rank 0's `value`; every rank has to call this at the same place."""
    import torch

    if world_size() == 1:
        return value
    box: list[Any] = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    given: Value = box[0]
    return given


def is_sharded() -> bool:
    """Return whether the ranks hold a part of the model's weights each (FSDP); accelerate reads the same variable."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" and world_size() > 1


def shared_batch(batch_size: int, accumulate: int, n: int, most: int) -> tuple[int, int]:
    """Return examples in one forward pass of a rank, at most `most`, and its forward passes in a step.

    Raises InputError: the examples of a step cannot be dealt out to `n` ranks.
    """
    total = batch_size * accumulate
    if total % n:
        raise InputError(
            f"train.processes = {n}: the {total} examples of a training step cannot be shared evenly",
            f"Set tune.batch_size and align.batch_size to multiples of {n}, or take another number of processes.",
        )
    each = total // n
    size = max(size for size in range(1, min(most, each) + 1) if each % size == 0)
    return size, each // size


def slot_weights(n_example: int, batch_size: int, accumulate: int, n: int) -> list[float]:
    """Return the weight of each example where a step's loss is a mean over examples, one in each forward pass.

    The last step may have fewer examples than ranks times passes: those that fill it up have the weight 0 and make the
    list longer than `n_example`. On one process the mean is that of the means of each forward pass.
    """
    per_step = batch_size * accumulate
    last = n_example % per_step or per_step
    passes = [min(batch_size, last - i) for i in range(0, last, batch_size)]
    n_slot = -(-last // n) * n
    weights = [n_slot / (len(passes) * size) for size in passes for _ in range(size)]
    return [1.0] * (n_example - last) + weights + [0.0] * (n_slot - last)


def train_on_ranks(
    kind: str,
    job: Mapping[str, Any],
    workspace: Workspace,
    n: int,
    progress: Callable[[int, int], None] | None,
    probe: Callable[[Path], Any] | None = None,
) -> None:
    """Run a training (``sft`` or ``dpo``) on `n` processes; its result is then at the place of `workspace`.

    Args:
        job: what `train_here` of this kind takes, as JSON.
        probe: checks an adapter's folder; its result has to be JSON.

    Raises:
        InputError: what `train_here` raises.
        ArteError: a process was lost; the same call resumes.
    """
    workspace.last_checkpoint()  # deletes incomplete ones, which no rank may do
    described = workspace.folder / "job.json"
    write_atomic(described, json.dumps({"kind": kind, **workspace.described(), **job}).encode())
    log, failure = workspace.folder / "log.txt", None
    ranks: list[subprocess.Popen[bytes]] = []
    lost: list[int] = []
    with tempfile.TemporaryDirectory(prefix="arte-edge-ranks-") as folder, log.open("wb") as output:
        try:
            for rank in range(n):
                ranks.append(_started(rank, n, described, Path(folder) / "store", output))
            watch = threading.Thread(target=_end_together, args=(ranks, lost), daemon=True)
            watch.start()
            failure = _follow(ranks[0], progress, probe)
            watch.join()
        finally:
            _end(ranks)
    if failure is not None:
        raise failure
    if lost:
        raise ArteError(
            f"Training on {n} processes: one was lost. The last lines of {log}:\n{_tail(log)}\n"
            f"  process {lost[0]} ended with {_how(ranks[lost[0]].returncode)}",
            "Run the same command again: it resumes from the last checkpoint. If memory ran out, lower train.processes "
            "or the batch size.",
        )


def _started(rank: int, n: int, job: Path, store: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start one rank. It ends when its input closes; the output of rank 0 is for `_follow`."""
    defaults = {"OMP_NUM_THREADS": str(max(thread_count() // n, 1)), "TOKENIZERS_PARALLELISM": "false"}
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "GLOO_SOCKET_IFNAME": _LOOPBACK,
        "NCCL_SOCKET_IFNAME": f"={_LOOPBACK}",
    }
    return subprocess.Popen(
        [sys.executable, "-m", _WORKER, str(job), str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if rank == 0 else log,
        stderr=log,
        env={**defaults, **os.environ, **own},
    )


def _end_together(ranks: Sequence[subprocess.Popen[bytes]], lost: list[int]) -> None:
    """Wait for all ranks; if one fails, put its number into `lost` and end the others, which would wait for it."""
    while not lost and any(rank.poll() is None for rank in ranks):
        lost += [i for i, rank in enumerate(ranks) if rank.poll()]
        time.sleep(_POLL_S)
    lost += [i for i, rank in enumerate(ranks) if rank.poll()]
    if lost:
        until = time.monotonic() + _GRACE_S
        while time.monotonic() < until and any(rank.poll() is None for rank in ranks):
            time.sleep(_POLL_S)
        _end(ranks)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    for rank in ranks:
        try:
            rank.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _follow(
    rank: subprocess.Popen[bytes], progress: Callable[[int, int], None] | None, probe: Callable[[Path], Any] | None
) -> ArteError | None:
    """Do what rank 0 says until it ends; return the error that it names, if it names one."""
    failure = None
    assert rank.stdout is not None and rank.stdin is not None
    with rank.stdout as lines, rank.stdin as answers:
        for line in lines:
            message = (parse_line(line) or {}).get("arte_edge")  # libraries print too
            if not isinstance(message, dict):
                continue
            if "step" in message and progress is not None:
                progress(message["step"], message["of"])
            if "probe" in message and probe is not None:
                adapter = Path(message["probe"])
                answer = {"adapter": adapter.name, "found": probe(adapter)}
                with suppress(BrokenPipeError):  # it was lost meanwhile
                    os.write(answers.fileno(), json.dumps(answer).encode() + b"\n")
            if "error" in message:
                kind = getattr(errors, message["error"], ArteError)
                failure = kind(message["message"], message["hint"])
    return failure


def refuse_processes(n: int, *, sharded: bool = False) -> None:
    """Raise if trainings cannot run on `n` processes here, or not with the weights spread over them.

    Raises InputError: fewer GPUs than processes, none to spread weights over, or this is one of several processes
    itself.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and "LOCAL_RANK" in os.environ:
        raise InputError(
            "This command was started on several processes (torchrun, accelerate launch), but a run is one",
            "Start it once, and set train.processes: it starts them for its trainings.",
        )
    if n == 1:
        return
    import torch

    from arte_edge.runtimes.transformers.placement import pick_device

    there, device = torch.cuda.device_count(), pick_device().type
    if sharded and device != "cuda":
        raise InputError(
            "train.shard_teacher: this machine has no GPUs to spread weights over",
            "Leave it out: each process then holds the whole teacher.",
        )
    if device == "mps" or (device == "cuda" and n > there):
        has = f"{there} GPU" + "s" * (there != 1) if device == "cuda" else "an Apple GPU, which takes one process"
        raise InputError(f"train.processes = {n}: this machine has {has}", "Lower it; each process needs a GPU.")


def _tail(log: Path) -> str:
    """Return the end of what the ranks said; torch begins their tracebacks so."""
    lines = log.read_text("utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith("[rank")][-_SHOWN_LINES:]
    return "\n".join(f"  {line}" for line in said) or "  no output"


def _how(code: int) -> str:
    known = {-number.value: number.name for number in signal.Signals}
    return known.get(code, f"exit code {code}")

"""Which engine scores candidates fastest on this machine: llama.cpp, or transformers in float32 or bfloat16.

It depends on the processor: one that multiplies bfloat16 in a matrix unit scores several times faster with it,
another is best served by llama.cpp. A small sample of the workload decides, once per machine and model
(`arte_edge.cache.cached_measurement`).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from arte_edge.cache import cached_measurement
from arte_edge.errors import ArteError
from arte_edge.machine import available_bytes
from arte_edge.runtimes.completion import Engine, Request, Sampling
from arte_edge.runtimes.transformers import onednn_prepack
from arte_edge.runtimes.transformers.placement import Floats, fast_floats, pick_device

Workload = Literal["write", "choose"]  # texts, or log-probabilities of given answers

_SIZE: dict[Floats, int] = {
    "bfloat16": 1,
    "float16": 1,
    "float32": 2,
}  # size of the weights, relative to the checkpoint's
_ROOM = 2.0  # times the weights: both the file's and the packed ones are in memory for a while
_WORTH = 0.8  # another candidate must take less than this share of the default's time
_ROUNDS = 2
_WRITTEN = 32  # tokens of each text

# The sample: two examples, and the same questions after each.
_EXAMPLES = (
    "Question: The lamp in the hall is too dim to read by.\nIt is dark in the hall and the lamp is on, so it "
    "should give more light. Nothing else is chosen for.\nAnswer: <ans>brighter</ans>\n\n",
    "Question: I can hardly hear the news from the kitchen.\nThe speaker is wanted louder: the news are on, and "
    "the person is in another room.\nAnswer: <ans>louder</ans>\n\n",
)
_ROOMS = ("bedroom", "kitchen", "hall", "garage", "bathroom", "attic", "cellar", "garden")
_WISHES = ("It is far too cold in the", "Somebody left the light on in the")
_CHOICES = ("brighter</ans>", "louder</ans>", "warmer</ans>", "switch off</ans>", "switch on</ans>", "cooler</ans>")


@dataclass(frozen=True)
class Candidate:
    """An engine that can score here. `dtype` is empty for the engine's default."""

    kind: Literal["llamacpp", "transformers"]
    dtype: Floats | Literal[""] = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.dtype}".strip()


def candidates_here(weights_bytes: int, *, has_file: bool, checkpoint: Path | None = None) -> list[Candidate]:
    """Return the engines that can run a student on this machine; the first is the default.

    Left out are 16-bit floats that the processor has no instructions for, what does not fit into memory, and
    dtypes other than ``ARTE_EDGE_DTYPE``.

    Args:
        weights_bytes: of the checkpoint, with 16 bits a weight.
        has_file: there is a GGUF file of the student too.
        checkpoint: the student's.
    """
    device = pick_device()
    gpu = device.type != "cpu"
    default = Candidate("llamacpp") if has_file else Candidate("transformers")
    fast: Floats = fast_floats(device, checkpoint)
    able: list[Floats] = ["bfloat16"] if not gpu and onednn_prepack.supported() else []
    able += [fast, "float32"] if gpu and fast != "float32" else ["float32"]
    # Without a GGUF file the default is that of `pick_dtype`.
    chosen = os.environ.get("ARTE_EDGE_DTYPE", "auto")
    known = chosen if chosen != "auto" else fast
    return [default] + [
        Candidate("transformers", dtype)
        for dtype in able
        if chosen in ("auto", dtype)
        and (has_file or dtype != known)
        and (gpu or _ROOM * _SIZE[dtype] * weights_bytes < available_bytes())
    ]


def fastest_engine(
    candidates: Sequence[Candidate],
    open_engine: Callable[[Candidate], Engine],
    workload: Workload,
    facts: Sequence[object],
) -> Candidate:
    """Return the fastest of `candidates` for this kind of workload; the same one every time.

    Args:
        open_engine: opens the engine of a candidate, which is closed afterwards.
        facts: what the result depends on besides the machine: the model, the versions of the runtimes.
    """
    if len(candidates) == 1:
        return candidates[0]

    def measure() -> dict[str, Any]:
        seconds = [_timed(open_engine, candidates[0], workload)]
        for candidate in candidates[1:]:
            seconds.append(float("inf"))
            # Skip engines that fail to run; the default is always available.
            with suppress(ArteError, RuntimeError, MemoryError):
                seconds[-1] = _timed(open_engine, candidate, workload)
        return {"engine": str(candidates[fastest(seconds, _WORTH)]), "seconds": [round(s, 3) for s in seconds]}

    def read(row: Mapping[str, Any]) -> Candidate | None:
        return next((candidate for candidate in candidates if str(candidate) == row["engine"]), None)

    return cached_measurement(
        "engine", [machine_id(), workload, [str(candidate) for candidate in candidates], *facts], read, measure
    )


def sample_seconds(engine: Engine, workload: Workload) -> float:
    """Return the seconds that the sample takes, the best of two after a warm-up."""
    best = float("inf")
    for turn in range(1 + _ROUNDS):
        began = time.perf_counter()
        _do(engine, workload, _WISHES if turn else _WISHES[:1])
        if turn:
            best = min(best, time.perf_counter() - began)
    return best


def _timed(open_engine: Callable[[Candidate], Engine], candidate: Candidate, workload: Workload) -> float:
    engine = open_engine(candidate)
    try:
        return sample_seconds(engine, workload)
    finally:
        engine.close()


def _do(engine: Engine, workload: Workload, wishes: Sequence[str]) -> None:
    questions = [f"Question: {wish} {place}.\n" for wish in wishes for place in _ROOMS]
    if workload == "write":
        sampling = Sampling(max_tokens=_WRITTEN, stop=("</ans>", "Question:"))
        engine.complete([Request(example + q) for example in _EXAMPLES for q in questions], sampling)
        return
    prompts = [f"{example}{q}Answer: <ans>" for example in _EXAMPLES for q in questions]
    engine.choose_each(prompts, [_CHOICES] * len(prompts))


def may_measure() -> bool:
    """Return whether anything may be measured; ``ARTE_EDGE_PROBE=0`` forbids it."""
    return os.environ.get("ARTE_EDGE_PROBE", "1") != "0"


def fastest(seconds: Sequence[float], worth: float) -> int:
    """Return the index of the minimum if it is below `worth` times the first, which is the default; else 0."""
    best = min(range(len(seconds)), key=lambda i: seconds[i])
    return best if seconds[best] < worth * seconds[0] else 0


def machine_id() -> str:
    """Return the architecture, the processor's name and the number of cores."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{platform.machine()} {name} {os.cpu_count()}"

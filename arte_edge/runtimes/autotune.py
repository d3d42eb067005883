"""Which engine scores drafts fastest on this machine: llama.cpp, or transformers in 32 bits or in bfloat16.

It depends on the processor. One that multiplies bfloat16 in a matrix unit scores several times
faster so; another is best served by llama.cpp. A small sample of the work decides, once a machine
and model (`measured_once`).
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

from arte_edge.cache import measured_once
from arte_edge.errors import ArteError
from arte_edge.memory import available_bytes
from arte_edge.runtimes.completion import Engine, Request, Sampling
from arte_edge.runtimes.transformers import onednn_prepack

__all__ = [
    "Way",
    "Work",
    "fastest",
    "machine",
    "probing",
    "quickest",
    "sample_seconds",
    "ways_here",
]

Floats = Literal["float32", "bfloat16"]
Work = Literal["write", "choose"]  # texts, or log-probabilities of given answers

_FLOATS: tuple[Floats, ...] = ("bfloat16", "float32")
_TIMES = {"bfloat16": 1, "float32": 2}  # the bytes of a weight, against those of the checkpoint
_ROOM = 2.0  # times the weights: they are laid out anew while the file's own are still there
_WORTH = 0.8  # another way must take less than this of the first one's time
_ROUNDS = 2
_WRITTEN = 32  # tokens of each text

# A sample of the work: two examples, and the same questions after each.
_EXAMPLES = (
    "Question: The lamp in the hall is too dim to read by.\nIt is dark in the hall and the lamp is on, so it "
    "should give more light. Nothing else is asked for.\nAnswer: <ans>brighter</ans>\n\n",
    "Question: I can hardly hear the news from the kitchen.\nThe speaker is wanted louder: the news are on, and "
    "the person is in another room.\nAnswer: <ans>louder</ans>\n\n",
)
_ROOMS = ("bedroom", "kitchen", "hall", "garage", "bathroom", "attic", "cellar", "garden")
_WISHES = ("It is far too cold in the", "Somebody left the light on in the")
_CHOICES = (
    "brighter</ans>",
    "louder</ans>",
    "warmer</ans>",
    "switch off</ans>",
    "switch on</ans>",
    "cooler</ans>",
)


@dataclass(frozen=True)
class Way:
    """How a student's drafts can be scored here. `floats` is empty where the engine takes what it does by default."""

    kind: Literal["llamacpp", "transformers"]
    floats: Floats | Literal[""] = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.floats}".strip()


def ways_here(weights_bytes: int, *, has_file: bool) -> list[Way]:
    """Return the ways that this machine has for a student; the first is the default.

    Left out are bfloat16 where the processor has no instructions for it, what memory cannot hold, and what
    ``ARTE_EDGE_DTYPE`` does not ask for.

    Args:
        weights_bytes: of the checkpoint, with 16 bits a weight.
        has_file: there is a GGUF file of the student too.
    """
    import torch

    gpu = torch.cuda.is_available()
    default = Way("llamacpp") if has_file else Way("transformers")
    bfloat16 = gpu or onednn_prepack.supported()
    # Without a file 32 bits on a processor, 16 on a GPU, or what is asked for are the default already.
    asked = os.environ.get("ARTE_EDGE_DTYPE", "auto")
    known = {asked} if asked != "auto" else {"bfloat16" if gpu else "float32"}
    others = [floats for floats in _FLOATS if asked in ("auto", floats) and (has_file or floats not in known)]
    return [default] + [
        Way("transformers", floats)
        for floats in others
        if (bfloat16 or floats != "bfloat16")
        and (gpu or _ROOM * _TIMES[floats] * weights_bytes < available_bytes())
    ]


def quickest(
    ways: Sequence[Way], opening: Callable[[Way], Engine], work: Work, facts: Sequence[object]
) -> Way:
    """Return the fastest of `ways` for this kind of work; the same one every time.

    Args:
        opening: opens the engine of a way; it is closed again.
        facts: what the answer depends on beside the machine: the model, the versions of the runtimes.
    """
    if len(ways) == 1:
        return ways[0]

    def measure() -> dict[str, Any]:
        seconds = [_timed(opening, ways[0], work)]
        for way in ways[1:]:
            seconds.append(float("inf"))
            # A way that cannot be gone here is not taken; it must not end a run that has another.
            with suppress(ArteError, RuntimeError, MemoryError):
                seconds[-1] = _timed(opening, way, work)
        return {"way": str(ways[fastest(seconds, _WORTH)]), "seconds": [round(s, 3) for s in seconds]}

    def read(row: Mapping[str, Any]) -> Way | None:
        return next((way for way in ways if str(way) == row["way"]), None)

    return measured_once("engine", [machine(), work, [str(way) for way in ways], *facts], read, measure)


def sample_seconds(engine: Engine, work: Work) -> float:
    """Return the seconds that the sample takes, the best of two after one to warm up."""
    best = float("inf")
    for turn in range(1 + _ROUNDS):
        began = time.perf_counter()
        _do(engine, work, _WISHES if turn else _WISHES[:1])
        if turn:
            best = min(best, time.perf_counter() - began)
    return best


def _timed(opening: Callable[[Way], Engine], way: Way, work: Work) -> float:
    engine = opening(way)
    try:
        return sample_seconds(engine, work)
    finally:
        engine.close()


def _do(engine: Engine, work: Work, wishes: Sequence[str]) -> None:
    questions = [f"Question: {wish} {place}.\n" for wish in wishes for place in _ROOMS]
    if work == "write":
        sampling = Sampling(max_tokens=_WRITTEN, stop=("</ans>", "Question:"))
        engine.complete([Request(example + q) for example in _EXAMPLES for q in questions], sampling)
        return
    prompts = [f"{example}{q}Answer: <ans>" for example in _EXAMPLES for q in questions]
    engine.choose_each(prompts, [_CHOICES] * len(prompts))


def probing() -> bool:
    """Return whether anything may be measured; ``ARTE_EDGE_PROBE=0`` says no."""
    return os.environ.get("ARTE_EDGE_PROBE", "1") != "0"


def fastest(seconds: Sequence[float], worth: float) -> int:
    """Return the place of the least, if it is less than `worth` times the first, which is the default; else 0."""
    best = min(range(len(seconds)), key=lambda i: seconds[i])
    return best if seconds[best] < worth * seconds[0] else 0


def machine() -> str:
    """Return what tells this kind of machine from another: the processor's name, its kind and its cores."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{platform.machine()} {name} {os.cpu_count()}"

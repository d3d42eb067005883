"""Which context layout is fastest here: measured once per machine, model and llama.cpp version, then cached.

Speeds differ by tens of percent between layouts, and which one wins depends on the processor.
``ARTE_EDGE_PROBE=0`` takes `DEFAULT_LAYOUT` instead.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.cache import cached_measurement
from arte_edge.gguf.reader import read_model_header
from arte_edge.machine import available_bytes
from arte_edge.runtimes.autotune import fastest, machine_id, may_measure
from arte_edge.runtimes.llamacpp.bindings import DEFAULT_LAYOUT, Layout, LlamaContext, LlamaModel, context_bytes

# The first is the default. In a unified cache attention is only fast row by row, below 64 rows
# (ggml's GGML_FA_TILE_Q), because longer tiles attend to the cells of all sequences.
CANDIDATES = (DEFAULT_LAYOUT, Layout(flash=True), Layout(unified=True, flash=True, ubatch=63))

_SEQUENCES = 24
_PREFIX, _SUFFIX, _STEPS = 192, 24, 3  # tokens shared, tokens of each question, decode steps timed
_ANSWER = 40  # tokens of an answer: the weight of a step relative to the suffix
_ROUNDS = 2
_WORTH = 0.95  # another layout must take less than this share of the default's time
_SLOW_S = 4.0  # a model whose first round takes longer keeps the default: measuring it would take too long


def layout_for(model: LlamaModel, sha256: str, threads: int) -> Layout:
    """Return the layout to decode `model` with on this machine; the same one every time.

    Files with the same tensors share it: a tuned student takes that of its base. A file without a known `sha256` gets
    the default.
    """
    if not sha256 or not may_measure():
        return DEFAULT_LAYOUT
    tensors = [[each.name, each.shape, each.type] for each in read_model_header(model.path).tensors.values()]
    facts = [machine_id(), threads, tensors, f"{model.lib.__name__} {model.lib.__version__}", _SEQUENCES]
    facts += ["float32"] * model.widened

    def measure() -> dict[str, Any]:
        seconds = probe(model, threads)
        return {"layout": asdict(CANDIDATES[fastest(seconds, _WORTH)]), "seconds": [round(s, 4) for s in seconds]}

    return cached_measurement("layout", facts, _read, measure)


def probe(model: LlamaModel, threads: int) -> list[float]:
    """Return the seconds that each of `CANDIDATES` takes for a small grid, infinite for those not tried."""
    seconds = [float("inf")] * len(CANDIDATES)
    for turn in range(_ROUNDS):
        for i, layout in enumerate(CANDIDATES):
            n_ctx = _PREFIX + _SUFFIX + _STEPS + 1
            if context_bytes(model, _SEQUENCES + 1, -(-n_ctx // 256) * 256, layout.ubatch) < available_bytes():
                began = time.perf_counter()
                seconds[i] = min(seconds[i], _grid_seconds(model, threads, layout))
                if turn == 0 and i == 0 and time.perf_counter() - began > _SLOW_S:
                    return seconds
    return seconds


def _grid_seconds(model: LlamaModel, threads: int, layout: Layout) -> float:
    """Return the time of the suffixes of `_SEQUENCES` sequences after one prefix plus `_ANSWER` steps."""
    n_ctx_seq = -(-(_PREFIX + _SUFFIX + _STEPS + 1) // 256) * 256
    context = LlamaContext(model, _SEQUENCES + 1, n_ctx_seq, threads, layout=layout)
    try:
        _decode(context, 1, 0, _PREFIX, first=_SEQUENCES)
        for slot in range(_SEQUENCES):
            context.copy(_SEQUENCES, slot)
        _decode(context, _SEQUENCES, _PREFIX, 1)  # performs the copies
        began = time.perf_counter()
        _decode(context, _SEQUENCES, _PREFIX + 1, _SUFFIX)
        suffix_s = time.perf_counter() - began
        steps = []
        for step in range(_STEPS):
            began = time.perf_counter()
            _decode(context, _SEQUENCES, _PREFIX + 1 + _SUFFIX + step, 1)
            steps.append(time.perf_counter() - began)
        return suffix_s + _ANSWER * min(steps)
    finally:
        context.close()


def _decode(context: LlamaContext, n_seq: int, start: int, n: int, first: int = 0) -> None:
    """Decode `n` synthetic tokens of each of `n_seq` sequences from position `start` on, logits of the last ones."""
    at: NDArray[np.int32] = np.tile(np.arange(start, start + n, dtype=np.int32), n_seq)
    sequences = np.repeat(np.arange(first, first + n_seq, dtype=np.int32), n)
    tokens = ((at * 31 + sequences * 7) % min(context.model.n_vocab, 1000)).astype(np.int32)
    context.decode_arrays(tokens, at, sequences, (at == start + n - 1).astype(np.int8))


def _read(row: dict[str, Any]) -> Layout | None:
    layout = Layout(**row["layout"])
    return layout if layout in CANDIDATES else None

"""arte-edge's own ways to answer or score a draft's preference questions, and the ceiling; see `preference_peers`."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = [
    "WARM_UP",
    "Texts",
    "Work",
    "ceiling",
    "likelihood",
    "ours",
    "pipeline",
    "pipeline_likelihood",
    "transformers_likelihood",
    "transformers_ours",
]

Work = dict[str, Any]
Texts = tuple[list[str], int]  # texts, tokens written
WARM_UP = "Question: is it warm?\nAnswer:"


def ours(work: Work) -> Callable[[], Texts]:
    """Return arte-edge's engine on all drafts of the work, in one call."""
    return _writing(_engine(work), work)


def _writing(engine: Any, work: Work) -> Callable[[], Texts]:
    from arte_edge.runtimes.completion import Request, Sampling

    engine.complete([Request(WARM_UP)], Sampling(max_tokens=2))
    sampling = Sampling(max_tokens=work["tokens"], stop=tuple(work["stop"]))

    def write() -> Texts:
        done = engine.complete([Request(prompt) for prompt in work["prompts"]], sampling)
        return [c.text for c in done], sum(c.completion_tokens for c in done)

    return write


def likelihood(work: Work) -> Callable[[], Texts]:
    """Return the scores of the given answers: no text is written, the tokens are scores."""
    engine = _engine(work)
    engine.choose_each([WARM_UP], [["yes", "no"]])

    def score() -> Texts:
        rows = engine.choose_each(work["forced"], work["choices"])
        return _likeliest(rows, work["choices"]), len(rows)

    return score


def pipeline(work: Work) -> Callable[[], Texts]:
    """Return what `distill` itself does: calls through the store, at the default number of sequences."""
    from arte_edge.runtimes.completion import Request, Sampling

    calls, engine = _calls(), _engine(work, 32)
    engine.complete([Request(WARM_UP)], Sampling(max_tokens=2))
    sampling = Sampling(max_tokens=work["tokens"], stop=tuple(work["stop"]))

    def write() -> Texts:
        requests = [Request(prompt) for prompt in work["prompts"]]
        done = calls.complete(engine, requests, sampling, "scores", together=True)
        return [c.text for c in done], sum(c.completion_tokens for c in done)

    return write


def pipeline_likelihood(work: Work) -> Callable[[], Texts]:
    """Return the scores of the given answers as `distill` gets them, several drafts a call."""
    calls, engine = _calls(), _engine(work, 32)
    engine.choose_each([WARM_UP], [["yes", "no"]])
    k = work["k"]
    drafts = [slice(at, at + k) for at in range(0, len(work["forced"]), k)]

    def score() -> Texts:
        asks = [(work["forced"][draft], work["choices"][draft]) for draft in drafts]
        rows = [row for ask in calls.choose_each(engine, asks, "scores") for row in ask]
        return _likeliest(rows, work["choices"]), len(rows)

    return score


def _calls() -> Any:
    """Return a store's calls in a folder that is thrown away."""
    from arte_edge.console import Reporter
    from arte_edge.distill.cached_calls import Calls
    from arte_edge.store import CallLog

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Calls(CallLog(folder / "calls.jsonl"), Reporter(folder / "events.jsonl", quiet=True))


def _likeliest(rows: Any, choices: list[list[str]]) -> list[str]:
    best = [own[max(range(len(own)), key=lambda i: row[i])] for row, own in zip(rows, choices, strict=True)]
    return [f"<ans>{choice}" for choice in best]


def transformers_ours(work: Work) -> Callable[[], Texts]:
    """Return arte-edge's transformers engine on all drafts of the work, in one call."""
    return _writing(_transformers(work), work)


def _transformers(work: Work) -> Any:
    from arte_edge.runtimes.transformers.model import TransformersEngine

    kind = {"fp32": "float32", "bf16": "bfloat16"}[work["dtype"]]
    return TransformersEngine(Path(work["checkpoint"]), sha256="", device="cpu", dtype=kind)


def transformers_likelihood(work: Work) -> Callable[[], Texts]:
    """Return the scores of the given answers by arte-edge's transformers engine."""
    engine = _transformers(work)
    engine.choose_each([WARM_UP], [["yes", "no"]])

    def score() -> Texts:
        rows = engine.choose_each(work["forced"], work["choices"])
        return _likeliest(rows, work["choices"]), len(rows)

    return score


def _engine(work: Work, parallel: int = 0) -> Any:
    from arte_edge.runtimes.llamacpp.engine import LlamaCppEngine

    parallel = parallel or (64 if len(work["prompts"]) > 64 else 40)
    return LlamaCppEngine(Path(work["gguf"]), sha256="", parallel=parallel, threads=work["threads"])


def ceiling(work: Work) -> Callable[[], Texts]:
    """Return the best rate of one-token rows with logits for each, over sequence counts and with and without
    flash attention, at the work's depth."""
    import numpy as np

    from arte_edge.runtimes.llamacpp.bindings import Layout, LlamaContext, LlamaModel

    model = LlamaModel(Path(work["gguf"]))
    depth, steps = work["ceiling_depth"], 6

    def best() -> Texts:
        rates = {}
        for n, flash in ((n, flash) for flash in (False, True) for n in (32, 48, 64, 96)):
            n_ctx = -(-(depth + steps + 1) // 256) * 256
            context = LlamaContext(model, n + 1, n_ctx, work["threads"], layout=Layout(flash=flash))
            at = np.arange(depth, dtype=np.int32)
            context.decode_arrays(at % 900 + 50, at, at * 0 + n, (at * 0).astype(np.int8))
            for slot in range(n):
                context.copy(n, slot)
            slots, times = np.arange(n, dtype=np.int32), []
            for step in range(steps + 1):
                began = time.perf_counter()
                row = slots * 0
                context.decode_arrays(slots % 900 + 50, row + depth + step, slots, (row + 1).astype(np.int8))
                times.append(time.perf_counter() - began)
            context.close()
            rates[f"{n}{' flash' * flash}"] = n * steps / sum(times[1:])
        return [json.dumps({n: round(rate, 1) for n, rate in rates.items()})], round(max(rates.values()))

    return best

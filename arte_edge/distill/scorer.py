"""The engine that scores drafts: the fastest of those that can run the student here.

Scores say which draft is better, and thousands of them are asked for. So they are computed where that is
fastest, in bfloat16 on a processor or a GPU that multiplies it: rounding moves single answers, and hardly the
order of drafts (docs/engines.md has both measured). What is reported of a student in numbers, before and
after, always comes from its own engine. A run that prefers as the quantized file does scores with that file.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from arte_edge.distill.run import Run
from arte_edge.distill.student_file import base_file, quantized_file
from arte_edge.runtimes.autotune import Way, Work, probing, quickest, ways_here
from arte_edge.runtimes.completion import Engine
from arte_edge.runtimes.loader import is_server, open_local

__all__ = ["scoring_engine"]

_WORTH_SCORES = 500  # below, opening another engine and the first measuring take longer than they save
_RUNTIMES = ("llama_cpp_python", "xllamacpp", "torch", "transformers")


def scoring_engine(run: Run, n_score: int) -> Engine:
    """Return the open engine for `n_score` scores (a draft before one question each)."""
    config, prefer = run.config.student, run.config.prefer
    if prefer.student_file:
        return run.engine_with(
            quantized_file(run.local(config), prefer.student_file, run.quantize), None, config
        )
    pinned = prefer.engine == "student" or config.engine != "auto" or is_server(config.model)
    if pinned or n_score < _WORTH_SCORES or not probing():
        return run.engine(config)
    model = run.local(config)

    def opening(way: Way) -> Engine:
        which = base_file(model) if way.kind == "llamacpp" else model
        return open_local(which, kind=way.kind, parallel=config.parallel, floats=way.floats)

    weights_bytes = sum(file.stat().st_size for file in model.checkpoint().glob("*.safetensors"))
    ways = ways_here(weights_bytes, has_file=model.gguf is not None)
    work: Work = "write" if prefer.score == "accuracy" else "choose"
    way = quickest(ways, opening, work, [model.sha256, config.parallel, *map(_version, _RUNTIMES)])
    if way.kind == "llamacpp":
        return run.engine(config)
    return run.engine_with(
        model, None, config.model_copy(update={"engine": "transformers"}), floats=way.floats
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

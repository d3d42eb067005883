"""Open the right engine for a model: llama.cpp for GGUF files, transformers for checkpoints, a server for openai:."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

from arte_edge.cache import Progress
from arte_edge.errors import InputError
from arte_edge.models.local import LocalModel
from arte_edge.models.resolve import resolve
from arte_edge.runtimes.completion import Engine

__all__ = ["ServerLimits", "is_server", "open_engine", "open_local"]

Kind = Literal["auto", "llamacpp", "transformers"]


@dataclass(frozen=True)
class ServerLimits:
    """How a server wants to be treated. None: no limit."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout_s: float = 120.0


_NO_LIMITS = ServerLimits()


def is_server(ref: str) -> bool:
    """Return whether `ref` names a model behind an OpenAI-compatible server."""
    return ref.startswith("openai:")


def open_engine(
    ref: str,
    *,
    kind: Kind = "auto",
    parallel: int = 32,
    offline: bool = False,
    progress: Progress | None = None,
    limits: ServerLimits = _NO_LIMITS,
) -> Engine:
    """Open the engine of `ref`, fetching the model if it is not here yet.

    `parallel` is how many sequences decode together, or how many requests a server gets at once;
    `limits` are for servers alone.

    Raises:
        InputError: an unknown model, or one that this kind of engine cannot run.
    """
    if is_server(ref):
        from arte_edge.runtimes.openai.engine import OpenAIEngine, parse_ref

        return cast(Engine, OpenAIEngine(*parse_ref(ref), max_concurrency=parallel, **asdict(limits)))
    return open_local(resolve(ref, offline=offline, progress=progress), kind=kind, parallel=parallel)


def open_local(
    model: LocalModel,
    *,
    kind: Kind = "auto",
    parallel: int = 32,
    adapter: tuple[Path, str] | None = None,
    floats: str = "",
) -> Engine:
    """Open the engine of a model on this machine. `adapter` is a LoRA adapter's path and sha256.

    For llama.cpp the adapter is a GGUF file, for transformers a PEFT folder. `floats` are what
    transformers computes in, float32 or bfloat16; empty: what suits the machine.
    """
    path, sha256 = adapter or (None, "")
    if kind == "llamacpp" or (kind == "auto" and model.gguf is not None):
        if model.gguf is None:
            raise InputError(
                f"{model.name}: engine = 'llamacpp' needs a GGUF file, this is a checkpoint",
                "Use engine = 'transformers', or give the path of a .gguf file.",
            )
        from arte_edge.runtimes.llamacpp.engine import LlamaCppEngine

        return LlamaCppEngine(
            model.gguf,
            sha256=model.sha256,
            quantization=model.quantization,
            adapter=path,
            adapter_sha256=sha256,
            parallel=parallel,
        )
    from arte_edge.runtimes.transformers.model import TransformersEngine

    return cast(
        Engine,
        TransformersEngine(model.checkpoint(), sha256=model.sha256, adapter=path, dtype=floats or "auto"),
    )

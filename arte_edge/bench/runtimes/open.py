"""Which runtime opens which model, if nobody says."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from arte_edge.bench.runtime import SpeedModel
from arte_edge.bench.runtimes.null import NullSpeedModel, null_ms
from arte_edge.errors import InputError

__all__ = ["choose_runtime", "open_speed_model", "warm_import"]

# format -> runtimes that open it, best first
_RUNTIMES = {
    "gguf": ("llama-cpp-python", "xllamacpp"),
    "onnx-genai": ("onnxruntime-genai", "onnxruntime"),
    "onnx": ("onnxruntime",),
    "safetensors": ("transformers",),
    "null": ("null",),
}
_MODULES = {
    "llama-cpp-python": ("llama_cpp",),
    "xllamacpp": ("xllamacpp",),
    "onnxruntime-genai": ("onnxruntime_genai",),
    "onnxruntime": ("onnxruntime",),
    "transformers": ("torch", "transformers"),
    "null": (),
}
_CACHED = ("f16", "f16")


def model_format(path: Path) -> str:
    """Return gguf, onnx-genai, onnx, safetensors or null.

    Raises:
        InputError: nothing there, or nothing that can be measured.
    """
    if null_ms(path) is not None and not path.exists():
        return "null"
    if path.is_file():
        return "gguf"
    if (path / "genai_config.json").is_file():
        return "onnx-genai"
    if any(path.glob("*.onnx")) or any(path.glob("onnx/*.onnx")):
        return "onnx"
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return "safetensors"
    raise InputError(
        f"{path}: no model that can be measured",
        "Give a .gguf file, a folder with an ONNX model, or a checkpoint folder.",
    )


def choose_runtime(path: Path, runtime: str = "auto") -> str:
    """Return the name of the runtime that opens `path`: the one asked for, else the best that is installed.

    ``ARTE_EDGE_GGUF_RUNTIME`` chooses for GGUF files where `runtime` does not.

    Raises:
        InputError: this runtime does not open this kind of model.
    """
    kind = model_format(path)
    able = _RUNTIMES[kind]
    if runtime == "auto" and kind == "gguf":
        runtime = os.environ.get("ARTE_EDGE_GGUF_RUNTIME", "auto")
    if runtime != "auto":
        if runtime not in able:
            raise InputError(f"--runtime {runtime}: does not run {kind} models", f"Known: {', '.join(able)}.")
        return runtime
    return next((name for name in able if all(map(find_spec, _MODULES[name]))), able[0])


def warm_import(path: Path, runtime: str = "auto") -> None:
    """Import the runtime's library, if it is installed, so that its loading is not taken for the model's."""
    for module in _MODULES[choose_runtime(path, runtime)]:
        if find_spec(module) is not None:
            importlib.import_module(module)


def open_speed_model(
    path: Path,
    *,
    threads: int,
    context_tokens: int,
    runtime: str = "auto",
    type_k: str = "f16",
    type_v: str = "f16",
) -> SpeedModel:
    """Open a model for measuring.

    Args:
        path: a GGUF file, an onnxruntime-genai, plain ONNX or checkpoint folder, or ``null[:MS]``.
        threads: of the runtime.
        context_tokens: room in the cache.
        runtime: see `choose_runtime`.
        type_k: type of the cached keys; only llama-cpp-python takes another than f16.
        type_v: of the cached values.

    Raises:
        InputError: nothing there, damaged, or not for this runtime.
        ArteError: the runtime is not installed, or failed.
    """
    chosen = choose_runtime(path, runtime)
    if (type_k, type_v) != _CACHED and chosen not in ("llama-cpp-python", "null"):
        raise InputError(f"-ctk/-ctv: {chosen} does not take cache types", "They are for llama-cpp-python.")
    openers: dict[str, Callable[[], SpeedModel]] = {
        "null": lambda: NullSpeedModel(context_tokens, null_ms(path) or 0.0),
        "llama-cpp-python": lambda: _llama(path, threads, context_tokens, type_k, type_v),
        "xllamacpp": lambda: _xllama(path, threads, context_tokens),
        "onnxruntime-genai": lambda: _genai(path, threads, context_tokens),
        "onnxruntime": lambda: _onnx(path, threads, context_tokens),
        "transformers": lambda: _hf(path, threads, context_tokens),
    }
    return openers[chosen]()


def _llama(path: Path, threads: int, context_tokens: int, type_k: str, type_v: str) -> SpeedModel:
    from arte_edge.bench.runtimes.llamacpp import LlamaSpeedModel

    return LlamaSpeedModel(path, threads, context_tokens, type_k, type_v)


def _xllama(path: Path, threads: int, context_tokens: int) -> SpeedModel:
    from arte_edge.bench.runtimes.xllamacpp import XllamaSpeedModel

    return XllamaSpeedModel(path, threads, context_tokens)


def _genai(path: Path, threads: int, context_tokens: int) -> SpeedModel:
    from arte_edge.bench.runtimes.genai import GenaiSpeedModel

    return GenaiSpeedModel(path, threads, context_tokens)


def _onnx(path: Path, threads: int, context_tokens: int) -> SpeedModel:
    from arte_edge.bench.runtimes.onnx import OnnxSpeedModel

    return OnnxSpeedModel(path, threads, context_tokens)


def _hf(path: Path, threads: int, context_tokens: int) -> SpeedModel:
    from arte_edge.bench.runtimes.hf import HfSpeedModel

    return HfSpeedModel(path, threads, context_tokens)

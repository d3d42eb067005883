"""Which runtime opens which model, and the three ways to open one.

`open_engine` and `open_local` open an `Engine` for distillation, `open_model` a `Runtime` for verification, and
`open_decoder` a `Decoder` for benchmarks, with a cache of a given size and the runtime of choice.

A benchmark also times a model that does nothing, or sleeps a given time: what remains is the cost of the benchmark
itself. Its name is ``null``, or ``null:MS`` for one that takes MS milliseconds a token.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from arte_edge.device.model_size import model_format
from arte_edge.errors import InputError
from arte_edge.extras import need
from arte_edge.gguf.reader import read_model_header
from arte_edge.machine import total_bytes
from arte_edge.model_folder import look
from arte_edge.models.resolve import LocalModel, resolve
from arte_edge.runtimes.completion import Engine
from arte_edge.runtimes.protocol import Decoder, Runtime, RuntimeFacts

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
_DEFAULT_TYPES = ("f16", "f16")

Kind = Literal["auto", "llamacpp", "transformers", "int8"]


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a server, None: no limit; and whether it `continues` a begun answer, None: to be found out."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout_s: float = 120.0
    continues: bool | None = None


_NO_LIMITS = ServerLimits()


def is_server(ref: str) -> bool:
    """Return whether `ref` names a model behind an OpenAI-compatible server."""
    return ref.startswith("openai:")


def open_engine(ref: str, *, parallel: int = 32, limits: ServerLimits = _NO_LIMITS) -> Engine:
    """Open the engine of `ref`, fetching the model if it is not here yet.

    `parallel` is how many sequences decode together, or how many requests a server gets at once;
    `limits` are for servers alone.

    Raises InputError: an unknown model, or one that no engine here can run.
    """
    if is_server(ref):
        from arte_edge.runtimes.openai.engine import OpenAIEngine, parse_ref

        return OpenAIEngine(*parse_ref(ref), max_concurrency=parallel, **asdict(limits))
    return open_local(resolve(ref), parallel=parallel)


_LEAST_CONVERTED = 300_000_000  # parameters; smaller models gain little over llama.cpp, and lose more to rounding
_CONVERTED_FAMILIES = ("llama", "qwen2", "qwen3")  # those whose checkpoint from a GGUF file is known to be the same
_INT8_ROOM = 2  # times the weights in 16 bits: opening takes less than one and a half (docs/runs.md)
_FLOAT32_ROOM = 5  # times the weights in 32 bits: an alignment has its own beside the engine's


def teacher_kind(model: LocalModel, kind: Kind) -> Kind:
    """Return the engine of a teacher: `kind`, or for auto the fastest for a teacher that writes many texts at once.

    For a GGUF file of 0.3B parameters and more that is, where the machine has the memory, int8 if the processor
    multiplies 8-bit integers, and transformers in packed float32 on another x86 one: 1.6 to 2 times llama.cpp's speed
    for some dozen texts at once (benchmarks/results/whole_run). It is llama.cpp otherwise.
    """
    if kind != "auto" or model.gguf is None:
        return kind
    header = read_model_header(model.gguf)
    n = header.parameter_count
    large = header.architecture in _CONVERTED_FAMILIES and n >= _LEAST_CONVERTED
    if not (large and find_spec("torch")):
        return "llamacpp"
    from arte_edge.runtimes.transformers import onednn_int8, onednn_prepack
    from arte_edge.runtimes.transformers.placement import pick_device

    if pick_device().type == "cpu":
        if onednn_int8.supported():
            return "int8" if 2 * n * _INT8_ROOM <= total_bytes() else "llamacpp"
        if onednn_prepack.supports_float32() and 4 * n * _FLOAT32_ROOM <= total_bytes():
            return "transformers"
    return "llamacpp"


def open_local(
    model: LocalModel,
    *,
    kind: Kind = "auto",
    parallel: int = 32,
    adapter: tuple[Path, str] | None = None,
    dtype: str = "",
) -> Engine:
    """Open the engine of a model on this machine. `adapter` is a LoRA adapter's path and sha256.

    For llama.cpp the adapter is a GGUF file, for transformers a PEFT folder. `dtype` is what
    transformers computes in, float32 or bfloat16; empty: the default of the device.
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

    dtype = "int8" if kind == "int8" else dtype or "auto"
    vocabulary = model.gguf if find_spec("llama_cpp") else None
    return TransformersEngine(model.checkpoint(), sha256=model.sha256, adapter=path, dtype=dtype, vocabulary=vocabulary)


def decoder_format(path: Path) -> str:
    """Return `model_format` of `path`, or null for the name of a null model.

    Raises InputError: nothing there, or no model.
    """
    return "null" if null_ms(path) is not None and not path.exists() else model_format(path)


def open_model(path: Path, threads: int | None = None, runtime: str = "auto") -> Runtime:
    """Open a GGUF file, the only GGUF file in a folder, an ONNX folder or a checkpoint folder.

    Args:
        threads: of the runtime; None: ``ARTE_EDGE_THREADS``, or every core this process may use.
        runtime: see `choose_runtime`.

    Raises InputError: nothing there, damaged, no model that can be opened, or not by this runtime;
    ArteError: the runtime for it is not installed.
    """
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not any(path.rglob("*.onnx")) and look(path).kind == "gguf":
        path = ggufs[0]
    kind = model_format(path)
    if kind.startswith("onnx"):
        need("onnx", "Running ONNX models")
    if kind == "onnx":
        from arte_edge.runtimes.onnxruntime import check_files

        check_files(path)
    return _opened(path, choose_runtime(path, runtime), threads)


def _opened(
    path: Path,
    runtime: str,
    threads: int | None,
    context_tokens: int = 0,
    cache_types: tuple[str, str] = _DEFAULT_TYPES,
) -> Runtime:
    """Open a model in the runtime of this name, with room in the cache for a benchmark where that is given."""
    if runtime == "llama-cpp-python":
        from arte_edge.runtimes.llamacpp.runtime import LlamaCppRuntime

        return LlamaCppRuntime(path, threads, context_tokens, *cache_types)
    if runtime == "xllamacpp":
        from arte_edge.runtimes.llamacpp.xllamacpp import XllamaRuntime

        return XllamaRuntime(path, threads, context_tokens)
    if runtime == "transformers":
        from arte_edge.runtimes.transformers.runtime import TransformersRuntime

        return TransformersRuntime(path, threads, context_tokens)
    if runtime == "onnxruntime":
        from arte_edge.runtimes.onnxruntime import OnnxRuntime

        return OnnxRuntime(path, threads, context_tokens)
    from arte_edge.runtimes.genai import GenaiRuntime

    return GenaiRuntime(path, threads, context_tokens)


def choose_runtime(path: Path, runtime: str = "auto") -> str:
    """Return the name of the runtime that opens `path`: the given one, else the best that is installed.

    ``ARTE_EDGE_GGUF_RUNTIME`` chooses for GGUF files where `runtime` does not.

    Raises InputError: this runtime does not open this kind of model.
    """
    kind = decoder_format(path)
    able = _RUNTIMES[kind]
    if runtime == "auto" and kind == "gguf":
        runtime = os.environ.get("ARTE_EDGE_GGUF_RUNTIME", "auto")
    if runtime != "auto":
        if runtime not in able:
            raise InputError(f"--runtime {runtime}: does not run {kind} models", f"Known: {', '.join(able)}.")
        return runtime
    return next((name for name in able if all(map(find_spec, _MODULES[name]))), able[0])


def warm_import(path: Path, runtime: str = "auto") -> None:
    """Import the runtime's library, if it is installed, so that this is not counted as loading the model."""
    for module in _MODULES[choose_runtime(path, runtime)]:
        if find_spec(module) is not None:
            importlib.import_module(module)


def open_decoder(
    path: Path, *, threads: int, context_tokens: int, runtime: str = "auto", type_k: str = "f16", type_v: str = "f16"
) -> Decoder:
    """Open a model for a benchmark.

    Args:
        path: what `decoder_format` knows.
        threads: of the runtime.
        context_tokens: room in the cache.
        runtime: see `choose_runtime`.
        type_k: type of the cached keys; only llama-cpp-python takes another than f16.
        type_v: of the cached values.

    Raises InputError: nothing there, damaged, or not for this runtime;
    ArteError: the runtime is not installed, or failed.
    """
    chosen = choose_runtime(path, runtime)
    if (type_k, type_v) != _DEFAULT_TYPES and chosen not in ("llama-cpp-python", "null"):
        raise InputError(f"-ctk/-ctv: {chosen} does not take cache types", "They are for llama-cpp-python.")
    if chosen == "null":
        return NullDecoder(context_tokens, null_ms(path) or 0.0)
    return _opened(path, chosen, threads, context_tokens, (type_k, type_v))


_NULL = re.compile(r"null(?::(\d{1,6}(?:\.\d+)?))?")


def null_ms(path: Path) -> float | None:
    """Return the milliseconds a token that the name of a null model gives, None if it is no such name."""
    found = _NULL.fullmatch(str(path))
    return None if found is None else float(found[1] or 0)


class NullDecoder:
    """`Decoder` without a model."""

    facts = RuntimeFacts(runtime="null")
    n_vocab = 32_000

    def __init__(self, context_tokens: int, token_ms: float = 0.0) -> None:
        self.context_tokens = context_tokens
        self._token_s = token_ms / 1e3

    def clear(self) -> None:
        """Nothing to empty."""

    def prefill(self, tokens: Sequence[int]) -> int:
        if self._token_s:
            time.sleep(self._token_s * len(tokens))
        return 0

    def step(self, token: int) -> None:
        if self._token_s:
            time.sleep(self._token_s)

    def close(self) -> None:
        """Nothing to free."""

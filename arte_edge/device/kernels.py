"""How many bytes a second this machine decodes of each weight type: measured with models that hold only zeros.

On a desktop processor with few cores the arithmetic of a small model takes longer than the reading,
and how much longer depends on the type: one bandwidth for all of them would be wrong by a factor of
two. So a llama all of whose matrices have one type is written as a sparse file (nothing reaches the
disk), opened by the real runtime in a child process and decoded for a few tokens:

    seconds a token = bytes / rate + layers * layer_s

A tiny model, whose time is all threads that wait for each other, norms and attention, gives `layer_s`;
a large one a type gives its `rate`, at the width of the model that is asked about: kernels begin and
end a sum for each row, and a short row spends more of its time on that. They take the same time for
zeros as for numbers (37.4 against 36.1e9 bytes/s, F16). Needs llama-cpp-python.
"""

from __future__ import annotations

import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.errors import EngineError
from arte_edge.models.gguf_types import TENSOR_TYPES

__all__ = [
    "Kernels",
    "copied_here",
    "layer_seconds",
    "measure_kernels",
    "rate",
    "token_seconds",
    "whole_blocks",
    "write_zero_model",
]

_ALIGNMENT = 32
_MODEL_BYTES = 320_000_000  # well past the caches, also those of a server
_TOKENS = 24
_WARM = 4
_TINY = (64, 128)  # n_embd, n_ff
_TINY_LAYERS = (4, 28)
_TINY_TOKENS = 200
_LIMIT_S = 120


@dataclass(frozen=True)
class Kernels:
    """What the probe found."""

    rates: dict[str, float]  # type -> bytes/s of its matrices, read and multiplied
    layer_s: float  # of one layer, beside its bytes
    copied: tuple[str, ...] = ()  # types that the runtime repacks into memory of its own


def measure_kernels(
    types: Iterable[str], width: tuple[int, int], threads: int, *, fresh: bool = False
) -> Kernels:
    """Return the rates of `types` on this machine, from the last probe where there was one; about 1 s a type.

    Types that the probe does not know are left out.

    Args:
        width: ``(n_embd, n_ff)`` of the model that is asked about.

    Raises:
        EngineError: llama-cpp-python is not installed, or the probe failed.
    """
    from arte_edge.device.bandwidth import remembered

    version = _version()

    def ask(*what: str | int) -> float:
        key = " ".join(map(str, (version, f"threads={threads}", *what)))
        return float(remembered("kernels", key, lambda: _in_child(threads, *what), fresh=fresh))

    layer_s = ask("layer")
    rates = {}
    for kind in types:
        if kind in _known_types():
            n_embd, n_ff = whole_blocks(kind, width)
            rates[kind] = rate(kind, (n_embd, n_ff), ask(kind, n_embd, n_ff), layer_s)
    return Kernels(rates, layer_s, copied_here())


def copied_here() -> tuple[str, ...]:
    """Return the types that llama.cpp repacks on this machine."""
    from arte_edge.device.detect import detect
    from arte_edge.device.fit import repacked_types

    facts = detect()
    return repacked_types(facts.arch, facts.features)


def rate(kind: str, width: tuple[int, int], token_s: float, layer_s: float) -> float:
    """Return bytes/s of a type from the seconds that a token of its probe took."""
    n_layer = _n_layer(kind, width)
    # Noise may make the layers dearer than the whole; they never were more than half of it.
    return n_layer * _layer_bytes(kind, width) / max(token_s - n_layer * layer_s, token_s / 2)


def whole_blocks(kind: str, width: tuple[int, int]) -> tuple[int, int]:
    """Return `width` with both sizes rounded up to what a row of `kind` can be, and to whole heads of 64."""
    _, block_values, _ = TENSOR_TYPES[_number(kind)]
    step = max(64, block_values)
    n_embd, n_ff = (-(-max(64, size) // step) * step for size in width)
    return n_embd, n_ff


def _known_types() -> set[str]:
    return {name for name, _, _ in TENSOR_TYPES.values()}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"llama_cpp {version('llama-cpp-python')}"
    except PackageNotFoundError as error:
        raise EngineError(
            "Measuring kernels needs llama-cpp-python", "pip install 'arte-edge[gguf]'"
        ) from error


def _in_child(threads: int, *what: str | int) -> float:
    """Measure in a process of its own: an illegal instruction there is an error here, and memory is given back."""
    command = [sys.executable, "-m", "arte_edge.device.kernels", str(threads), *map(str, what)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        return float(json.loads(done.stdout)["seconds"])
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"The probe of {what[0]} took longer than {_LIMIT_S} s") from error
    except (ValueError, KeyError, TypeError) as error:
        said = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        raise EngineError(f"The probe of {what[0]} failed: {said[0]}") from error


def layer_seconds(threads: int) -> float:
    """Measure what a layer costs beside its bytes, in this process; seconds."""
    few, many = (token_seconds("F32", _TINY, threads, n_layer=n) for n in _TINY_LAYERS)
    return max(0.0, (many - few) / (_TINY_LAYERS[1] - _TINY_LAYERS[0]))


def token_seconds(kind: str, width: tuple[int, int], threads: int, n_layer: int = 0) -> float:
    """Measure the median time of a token of a probe model, in this process; seconds.

    Args:
        width: ``(n_embd, n_ff)`` as `whole_blocks` returns it.
        n_layer: 0: as many as fill the probe's bytes.
    """
    from arte_edge.engines.llama_runtime import LlamaContext, LlamaModel, Row

    tokens = _TINY_TOKENS if n_layer else _TOKENS
    with tempfile.TemporaryDirectory(prefix="arte-edge-probe-") as folder:
        path = write_zero_model(Path(folder) / "zeros.gguf", kind, n_layer or _n_layer(kind, width), *width)
        model = LlamaModel(path)
        context = LlamaContext(model, 1, 256, threads)
        times = []
        for position in range(_WARM + tokens):
            start = time.perf_counter()
            context.decode([Row(1, position, 0, want=True)])
            times.append(time.perf_counter() - start)
        context.close()
        model.close()
    return statistics.median(times[_WARM:])


def _n_layer(kind: str, width: tuple[int, int]) -> int:
    """Return how many layers fill the probe's bytes, fewer where memory is short (weights may be copied)."""
    from arte_edge.device.memory import available_bytes

    size_bytes = min(_MODEL_BYTES, available_bytes() // 4)
    return max(2, round(size_bytes / _layer_bytes(kind, width)))


def _layer_bytes(kind: str, width: tuple[int, int]) -> int:
    return sum(_size(shape, kind) for _, shape in _matrices(0, *width))


def _kv_heads(n_head: int) -> int:
    """Return how many key-value heads the probe has: a third of the heads or the next divisor below."""
    return next(count for count in range(n_head // 3, 0, -1) if n_head % count == 0)


def _matrices(layer: int, n_embd: int, n_ff: int) -> list[tuple[str, tuple[int, int]]]:
    """Return names and GGML shapes ``(n_in, n_out)`` of a layer's matrices, a third as many kv heads as heads."""
    n_head = max(4, n_embd // 64)
    n_kv = n_embd // n_head * _kv_heads(n_head)
    shapes = {
        "attn_q": (n_embd, n_embd),
        "attn_k": (n_embd, n_kv),
        "attn_v": (n_embd, n_kv),
        "attn_output": (n_embd, n_embd),
        "ffn_gate": (n_embd, n_ff),
        "ffn_up": (n_embd, n_ff),
        "ffn_down": (n_ff, n_embd),
    }
    return [(f"blk.{layer}.{name}.weight", shape) for name, shape in shapes.items()]


def _size(shape: tuple[int, ...], kind: str) -> int:
    count = 1
    for size in shape:
        count *= size
    _, block_values, block_bytes = TENSOR_TYPES[_number(kind)]
    return count // block_values * block_bytes


def _number(kind: str) -> int:
    return next(number for number, (name, _, _) in TENSOR_TYPES.items() if name == kind)


def write_zero_model(path: Path, kind: str, n_layer: int, n_embd: int, n_ff: int) -> Path:
    """Write a llama whose matrices are all of type `kind` and zero; the file is sparse. Return `path`.

    It has no tokenizer and a vocabulary of 256 ids. `n_embd` is a multiple of the type's block and of 64.
    """
    vocab = 256
    n_head = max(4, n_embd // 64)
    pairs: list[tuple[str, Any]] = [
        ("general.architecture", "llama"),
        ("llama.block_count", n_layer),
        ("llama.context_length", 2048),
        ("llama.embedding_length", n_embd),
        ("llama.feed_forward_length", n_ff),
        ("llama.attention.head_count", n_head),
        ("llama.attention.head_count_kv", _kv_heads(n_head)),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5),
        ("llama.vocab_size", vocab),
        ("tokenizer.ggml.model", "no_vocab"),
    ]
    tensors: list[tuple[str, tuple[int, ...], str]] = [("token_embd.weight", (n_embd, vocab), "F32")]
    for layer in range(n_layer):
        tensors += [(name, shape, kind) for name, shape in _matrices(layer, n_embd, n_ff)]
        tensors += [(f"blk.{layer}.{name}_norm.weight", (n_embd,), "F32") for name in ("attn", "ffn")]
    tensors.append(("output_norm.weight", (n_embd,), "F32"))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    head += b"".join(_pair(key, value) for key, value in pairs)
    offset = 0
    for name, shape, of_type in tensors:
        head += _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        head += struct.pack("<IQ", _number(of_type), offset)
        offset += -(-_size(shape, of_type) // _ALIGNMENT) * _ALIGNMENT
    start = -(-len(head) // _ALIGNMENT) * _ALIGNMENT
    with path.open("wb") as file:
        file.write(head)
        file.truncate(start + offset)
    return path


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _pair(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", 8) + _text(value)
    if isinstance(value, float):
        return _text(key) + struct.pack("<If", 6, value)
    return _text(key) + struct.pack("<II", 4, value)


if __name__ == "__main__":
    n_threads, kind, *sizes = sys.argv[1:]
    if kind == "layer":
        found = layer_seconds(int(n_threads))
    else:
        found = token_seconds(kind, (int(sizes[0]), int(sizes[1])), int(n_threads))
    print(json.dumps({"seconds": found}))

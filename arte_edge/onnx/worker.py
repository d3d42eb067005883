"""What runs in the exporters' own process: onnxruntime-genai's model builder, or optimum.

A script for any interpreter, so it imports nothing but the standard library at its top. It is
started as ``python -P worker.py`` and reads one JSON document from its first line of input:

    {"job": "genai", "arguments": [...]}     the arguments of onnxruntime_genai.models.builder
    {"job": "optimum", "checkpoint": "...", "out": "..."}
    {"job": "slim", "path": "..."}
    {"job": "quantize", "source": "...", "out": "...", "arch": "avx2"}

The input stays open as long as the parent lives. When it ends, even because the parent was
killed, this process ends too: nothing goes on writing into a folder that nobody waits for.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["main", "run_genai", "run_optimum", "run_quantize", "run_slim"]

_BUILDER = "onnxruntime_genai.models.builder"


def run_genai(arguments: list[str]) -> None:
    """Run the model builder as its command line does."""
    sys.argv = [_BUILDER, *arguments]
    runpy.run_module(_BUILDER, run_name="__main__", alter_sys=True)


def run_optimum(checkpoint: str, out: str) -> None:
    """Write ``model.onnx`` and its config files to `out`, from a checkpoint that transformers 4 reads."""
    from optimum.exporters.onnx import main_export

    # "-with-past" gives the graph a key-value cache; numerical validation is the gate's work.
    main_export(
        checkpoint,
        output=Path(out),
        task="text-generation-with-past",
        device="cpu",
        dtype="fp32",
        framework="pt",
        library_name="transformers",
        local_files_only=True,
        do_validation=False,
    )


def run_slim(path: str) -> None:
    """Take the shape arithmetic out of a model, in place; one that resists is as good as it was, only slower."""
    from arte_edge.onnx.simplify import slim  # only where arte-edge is: not optimum's environment

    try:
        print("nodes before and after:", slim(Path(path)))
    except Exception:
        traceback.print_exc()


def run_quantize(source: str, out: str, arch: str) -> None:
    """Write ``model_quantized.onnx`` to `out`: weights in int8, their inputs quantized while the model runs.

    Weights have one scale a row (per channel). Without an 8-bit dot product, avx2 and avx512 add
    pairs of products in 16 bits, which overflows when weights are signed: optimum's avx2 has unsigned
    ones, and for avx512 weights of seven bits (reduced range) keep clear of it, as onnxruntime advises
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer

    make = getattr(AutoQuantizationConfig, arch)
    options: dict[str, Any] = {"is_static": False, "per_channel": True}
    if arch == "avx512":
        options["reduce_range"] = True
    path = Path(source)
    options["nodes_to_exclude"] = _left_as_they_are(path)
    quantizer = ORTQuantizer.from_pretrained(path.parent, file_name=path.name)
    external = any(path.parent.glob(f"{path.name}_data*"))
    quantizer.quantize(make(**options), save_dir=Path(out), use_external_data_format=external)


def _left_as_they_are(source: Path) -> list[str]:
    """Return the names of the products that int8 would spoil.

    Products of two activations (queries with keys, weights with values): quantizing these would quantize
    the whole cache anew at every token, with one scale for all of it: slower, and less exact.
    onnxruntime's own `quantize_dynamic` leaves them alone too.

    The MLP's way back (down_proj): what goes into it has outliers a hundred times the rest ("massive
    activations", arXiv 2402.17762), and one scale for all tokens leaves the rest no bits. Without it
    the divergence of the quick start's student falls from 0.60 to 0.08 nats a token.
    """
    import onnx

    graph = onnx.load(str(source), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    return [n.name for n in products if n.input[1] not in constants or "/down_proj/" in n.name]


def _end_with_the_parent() -> None:
    # Not through sys.stdin: a thread that waits inside its lock is fatal when the interpreter ends.
    while os.read(0, 4096):
        pass
    os._exit(130)


def main() -> None:
    """Read one job from the input and do it."""
    job: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    jobs: dict[str, Callable[..., None]] = {
        "genai": run_genai,
        "optimum": run_optimum,
        "slim": run_slim,
        "quantize": run_quantize,
    }
    jobs[job.pop("job")](**job)


if __name__ == "__main__":
    main()

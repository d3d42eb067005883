"""The worker process of the exporters: onnxruntime-genai's model builder, or optimum.

A script for any interpreter, so only the standard library is imported at its top. It is started as
``python -P worker.py`` and reads one JSON document from its first line of input:

    {"job": "genai", "arguments": [...]}     the arguments of onnxruntime_genai.models.builder
    {"job": "optimum", "checkpoint": "...", "out": "..."}
    {"job": "simplify", "path": "..."}
    {"job": "quantize", "source": "...", "out": "...", "arch": "avx2"}

The input stays open while the parent lives. When it closes, also because the parent was killed, this process ends.
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

_BUILDER = "onnxruntime_genai.models.builder"


def run_genai(arguments: list[str]) -> None:
    """Run the command line of the model builder."""
    sys.argv = [_BUILDER, *arguments]
    runpy.run_module(_BUILDER, run_name="__main__", alter_sys=True)


def run_optimum(checkpoint: str, out: str) -> None:
    """Write ``model.onnx`` and its config files to `out`, from a checkpoint for transformers 4."""
    from optimum.exporters.onnx import main_export

    # "-with-past" adds a KV cache; numerical validation is done by `arte_edge.verify`.
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


def run_simplify(path: str) -> None:
    """Remove shape arithmetic from a model, in place. On failure the model is unchanged and slower."""
    from arte_edge.onnx.simplify import simplify  # not installed in optimum's environment

    try:
        print("nodes before and after:", simplify(Path(path)))
    except Exception:
        traceback.print_exc()


def run_quantize(source: str, out: str, arch: str) -> None:
    """Write ``model_quantized.onnx`` to `out`: int8 weights, dynamically quantized activations.

    Weights have one scale per row (per channel). Without 8-bit dot products, avx2 and avx512 add pairs of
    products in 16 bits, which overflows for signed weights: optimum's avx2 uses unsigned ones, and avx512 gets
    7-bit weights (reduced range), as onnxruntime recommends
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer

    make = getattr(AutoQuantizationConfig, arch)
    options: dict[str, Any] = {"is_static": False, "per_channel": True}
    if arch == "avx512":
        options["reduce_range"] = True
    path = Path(source)
    options["nodes_to_exclude"] = _excluded_products(path)
    quantizer = ORTQuantizer.from_pretrained(path.parent, file_name=path.name)
    external = any(path.parent.glob(f"{path.name}_data*"))
    quantizer.quantize(make(**options), save_dir=Path(out), use_external_data_format=external)


def _excluded_products(source: Path) -> list[str]:
    """Return the names of the matrix products that int8 would damage.

    Products of two activations (queries with keys, weights with values): quantizing them would quantize the
    whole cache for every token, with one scale: slower and less accurate. onnxruntime's own `quantize_dynamic`
    excludes them too.

    down_proj of the MLP: its inputs have outliers a hundred times larger than the rest ("massive activations",
    arXiv 2402.17762), and one scale for all tokens leaves no bits for the rest. Excluding it reduces the
    divergence of the quick start's student from 0.60 to 0.08 nats per token.
    """
    import onnx

    graph = onnx.load(str(source), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    return [n.name for n in products if n.input[1] not in constants or "/down_proj/" in n.name]


def _exit_with_parent() -> None:
    # Not sys.stdin: a thread that holds its lock is fatal when the interpreter exits.
    while os.read(0, 4096):
        pass
    os._exit(130)


def main() -> None:
    """Read one job from the input and run it."""
    job: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    jobs: dict[str, Callable[..., None]] = {
        "genai": run_genai,
        "optimum": run_optimum,
        "simplify": run_simplify,
        "quantize": run_quantize,
    }
    jobs[job.pop("job")](**job)


if __name__ == "__main__":
    main()

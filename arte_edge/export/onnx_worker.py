"""What runs in the exporters' own process: onnxruntime-genai's model builder, or optimum.

A script for any interpreter, so it imports nothing of arte-edge and only the standard library
at its top. It is started as ``python -P onnx_worker.py`` and reads one JSON document from its
first line of input:

    {"job": "genai", "arguments": [...]}     the arguments of onnxruntime_genai.models.builder
    {"job": "optimum", "checkpoint": "...", "out": "...", "fp32": "..." or null, "arch": "..." or null}

The input stays open as long as the parent lives. When it ends, even because the parent was
killed, this process ends too: nothing goes on writing into a folder that nobody waits for.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["main", "run_genai", "run_optimum"]

_BUILDER = "onnxruntime_genai.models.builder"


def run_genai(arguments: list[str]) -> None:
    """Run the model builder as its command line does."""
    sys.argv = [_BUILDER, *arguments]
    runpy.run_module(_BUILDER, run_name="__main__", alter_sys=True)


def run_optimum(checkpoint: str, out: str, fp32: str | None, arch: str | None) -> None:
    """Write ``out/model.onnx`` and its config files or, with `arch`, ``out/model_quantized.onnx``.

    Args:
        checkpoint: a folder with weights and a config that transformers 4 reads.
        out: an empty folder.
        fp32: an earlier fp32 ``model.onnx`` to quantize; without it the checkpoint is exported first.
        arch: the instruction set to quantize for: "arm64", "avx2" or "avx512".
    """
    folder = Path(out)
    if fp32 is None:
        from optimum.exporters.onnx import main_export

        # "-with-past" gives the graph a key-value cache; numerical validation is the gate's work.
        main_export(
            checkpoint,
            output=folder,
            task="text-generation-with-past",
            device="cpu",
            dtype="fp32",
            framework="pt",
            library_name="transformers",
            local_files_only=True,
            do_validation=False,
        )
        fp32 = str(folder / "model.onnx")
    if arch is not None:
        _quantize(Path(fp32), folder, arch)


def _quantize(source: Path, folder: Path, arch: str) -> None:
    """Quantize the weights of `source` to int8, and their inputs while the model runs (dynamic).

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
    quantizer = ORTQuantizer.from_pretrained(source.parent, file_name=source.name)
    external = any(source.parent.glob(f"{source.name}_data*"))
    quantizer.quantize(make(**options), save_dir=folder, use_external_data_format=external)
    if source.parent == folder:
        for path in [source, *folder.glob(f"{source.name}_data*")]:
            path.unlink()


def _end_with_the_parent() -> None:
    # Not through sys.stdin: a thread that waits inside its lock is fatal when the interpreter ends.
    while os.read(0, 4096):
        pass
    os._exit(130)


def main() -> None:
    """Read one job from the input and do it."""
    job: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    jobs: dict[str, Callable[..., None]] = {"genai": run_genai, "optimum": run_optimum}
    jobs[job.pop("job")](**job)


if __name__ == "__main__":
    main()

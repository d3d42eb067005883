"""Export a checkpoint to ONNX with onnxruntime-genai's model builder.

The builder writes fused attention with an in-place KV cache, and block-quantized weights of 4 or 8 bits
(MatMulNBits): the fastest ONNX layout on a CPU. The folder runs in onnxruntime-genai and in plain onnxruntime.

Its RMS normalization is the non-standard ``SimplifiedLayerNormalization`` in the domain of standard operators,
which `onnx.checker` and all tools except onnxruntime reject. `standardize` renames it to the equal
``RMSNormalization`` of opset 23 (https://onnx.ai/onnx/operators/onnx__RMSNormalization.html).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from arte_edge.checkpoint import shapes_of
from arte_edge.errors import ArteError, InputError
from arte_edge.extras import need
from arte_edge.files import read_json
from arte_edge.onnx.build import checkpoint_files, run_worker, staged
from arte_edge.onnx.check import finish

_OPSET = 23
_OLD, _NEW = "SimplifiedLayerNormalization", "RMSNormalization"
_ATTRIBUTES = {"axis", "epsilon", "stash_type"}


def standardize(path: Path) -> int:
    """Rename the RMS normalizations of the model in `path`; return how many.

    A node with features that the standard operator does not have (a second output) is not changed.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    changed = 0
    for node in model.graph.node:
        if node.op_type != _OLD or node.domain not in ("", "ai.onnx") or len(node.output) != 1:
            continue
        if {attribute.name for attribute in node.attribute} <= _ATTRIBUTES:
            node.op_type = _NEW
            changed += 1
    if changed:
        for row in model.opset_import:
            if row.domain in ("", "ai.onnx"):
                row.version = max(row.version, _OPSET)
        path.write_bytes(model.SerializeToString(deterministic=True))
    return changed


class Rounding(BaseModel):
    """How int4 and int8 weights are rounded; the keys of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block_size: Literal[16, 32, 64, 128, 256] = Field(
        default=32, description="weights per scale; smaller is more accurate and larger on disk"
    )
    accuracy_level: Literal[1, 2, 3, 4] = Field(
        default=4, description="type of matrix products: 4 int8 (fastest on a CPU), 3 bf16, 2 fp16, 1 fp32 (exact)"
    )
    algorithm: Literal["auto", "k_quant", "rtn"] = Field(
        default="auto",
        description="int4 scales: k_quant searches for them, rtn rounds to nearest; auto: k_quant if possible",
    )
    mixed: bool = Field(default=True, description="8 bits for the output and the most sensitive layers (k_quant only)")


class GenaiSettings(Rounding):
    """Settings of the builder; embedding and cache are always fp32."""

    precision: Literal["fp32", "int8", "int4"] = Field(default="int4", description="of matrix products")


def build(checkpoint: Path, out: Path, settings: GenaiSettings) -> Path:
    """Export `checkpoint` to the folder `out`, atomically and checked; return `out`.

    It contains ``model.onnx``, ``model.onnx.data``, ``genai_config.json`` and the checkpoint's tokenizer files.
    An earlier export is replaced. Nothing is downloaded.

    Raises InputError: not a checkpoint, k-quant is impossible for it, or `out` is something else;
    ArteError: a package is missing, the builder failed, or its output is invalid.
    """
    need("onnx", "Exporting to ONNX")
    need("train", "Exporting to ONNX")
    checkpoint = checkpoint.absolute()
    checkpoint_files(checkpoint)
    if settings.algorithm == "k_quant" and not _even_blocks(checkpoint, settings.block_size):
        raise InputError(
            f"{checkpoint}: rows of an odd number of {settings.block_size} weights cannot be k-quantized",
            'Use a smaller block_size, or algorithm = "rtn".',
        )
    with staged(out) as folder:
        job = {"job": "genai", "arguments": _arguments(checkpoint, folder, settings)}
        try:
            run_worker(job, folder.parent, what="onnxruntime-genai's model builder")
        except ArteError as error:
            if not (found := re.search(r"NotImplementedError: The (.+) (model|RoPE style) is not", error.message)):
                raise
            config = read_json(checkpoint / "config.json")
            rope = f"rope type '{found[1]}' in " if found[2] != "model" else ""
            raise InputError(
                f"{checkpoint}: onnxruntime-genai's builder does not support {rope}the family "
                f"{', '.join(map(str, config.get('architectures') or ()))}",
                "Export it to GGUF, or to the portable ONNX layout if optimum supports it.",
            ) from error
        _carry_penalty(checkpoint, folder)
        standardize(folder / "model.onnx")
        finish(checkpoint, folder)
    return out


def _carry_penalty(checkpoint: Path, folder: Path) -> None:
    """Write the checkpoint's repetition penalty to genai_config.json; the builder carries the other settings only."""
    penalty = read_json(checkpoint / "generation_config.json").get("repetition_penalty")
    if isinstance(penalty, int | float):
        config = read_json(folder / "genai_config.json")
        config.setdefault("search", {})["repetition_penalty"] = penalty
        (folder / "genai_config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")


def _even_blocks(checkpoint: Path, block_size: int) -> bool:
    """Return whether all matrix rows have an even number of blocks; the builder's k-quant fails otherwise."""
    matrices = [shape for shape in shapes_of(checkpoint).values() if len(shape) == 2]
    return all(shape[1] % (2 * block_size) == 0 for shape in matrices)


def _arguments(checkpoint: Path, folder: Path, settings: GenaiSettings) -> list[str]:
    options = ["hf_token=false", "hf_remote=false"]
    if settings.precision != "fp32":
        options += [f"block_size={settings.block_size}", f"accuracy_level={settings.accuracy_level}"]
    searched = settings.precision == "int4" and settings.algorithm != "rtn"
    if searched and _even_blocks(checkpoint, settings.block_size):
        # Round to nearest raises the perplexity of SmolLM2-135M by a third, more than the gate accepts; k-quant
        # scales with 8 bits for the most sensitive layers by a tenth, for 30 % more size.
        options.append("algo_config=k_quant")
        if settings.mixed:
            options.append("matmul_mixed_precision=last_matmul:int8,mixed_layers:int8")
    return [
        *("-i", str(checkpoint)),
        *("-o", str(folder)),
        *("-p", settings.precision),
        *("-e", "cpu"),
        *("-c", str(folder.parent / "cache")),
        *("--extra_options", *options),
    ]

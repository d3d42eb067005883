"""Operators that only onnxruntime knows under ONNX's own name, renamed to the standard ones.

onnxruntime-genai's builder writes RMS normalization as ``SimplifiedLayerNormalization`` in the
domain of standard operators, where ONNX has no such operator: `onnx.checker` refuses the file,
and so does every tool but onnxruntime. Since opset 23 the standard has the same operator, with
the same attributes, as ``RMSNormalization`` (https://onnx.ai/onnx/operators/onnx__RMSNormalization.html).

A checkpoint as an ONNX model for onnxruntime, through onnxruntime-genai's model builder.

The builder writes fused attention with a cache that grows in place, and weights of 4 or 8 bits
in blocks (MatMulNBits), which is what makes it the fastest ONNX layout on a CPU. The folder
runs in onnxruntime-genai and in plain onnxruntime (`arte_edge.runtimes.onnxruntime`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from arte_edge.checkpoint import shapes_of
from arte_edge.errors import ArteError, InputError
from arte_edge.extras import need
from arte_edge.onnx.check import require_sound
from arte_edge.onnx.child_process import run_worker
from arte_edge.onnx.folder import checkpoint_files, copy_tokenizer, refuse_leaks, staged

__all__ = ["GenaiSettings", "build", "standardize"]

_OPSET = 23
_OLD, _NEW = "SimplifiedLayerNormalization", "RMSNormalization"
_ATTRIBUTES = {"axis", "epsilon", "stash_type"}


def standardize(path: Path) -> int:
    """Rename the operators of the model in `path`, whose weights lie in other files; return how many.

    A node that uses more than the two operators share (a second output) is left as it is.
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


class GenaiSettings(BaseModel):
    """How the builder stores weights and multiplies with them.

    Attributes:
        precision: bits of the weights of matrix products. The embedding stays fp32, as does the cache.
        block_size: weights that share one scale; smaller is more exact and larger on disk.
        accuracy_level: what products are computed in: 4 int8 (fastest on a CPU), 3 bf16, 2 fp16, 1 fp32.
        algorithm: how int4 scales are found: "k_quant" (searched), "rtn" (plain rounding), "auto" for
            k_quant wherever the builder can.
        mixed: 8 bits in place of 4 for the output and the layers that matter most (k_quant only).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["fp32", "int8", "int4"] = "int4"
    block_size: Literal[16, 32, 64, 128, 256] = 32
    accuracy_level: int = Field(default=4, ge=1, le=4)
    algorithm: Literal["auto", "k_quant", "rtn"] = "auto"
    mixed: bool = True


def build(checkpoint: Path, out: Path, settings: GenaiSettings) -> Path:
    """Export `checkpoint` to the folder `out`, which appears whole and checked or not at all.

    Args:
        checkpoint: a folder of config.json, safetensors and tokenizer files; nothing is fetched.
        out: ``model.onnx``, ``model.onnx.data``, ``genai_config.json`` and the checkpoint's
            tokenizer files, byte for byte. An earlier export there is replaced.

    Returns:
        `out`.

    Raises:
        InputError: `checkpoint` is no checkpoint, k-quant was asked for and cannot be, or `out` is taken.
        ArteError: a package is missing, the builder failed, or what it wrote is not sound.
    """
    need("onnx", "Exporting to ONNX")
    need("train", "Exporting to ONNX")
    checkpoint = checkpoint.absolute()
    checkpoint_files(checkpoint)
    if settings.algorithm == "k_quant" and not _even_blocks(checkpoint, settings.block_size):
        raise InputError(
            f"{checkpoint}: rows of an odd number of {settings.block_size} weights cannot be k-quantized",
            'Take a smaller block_size, or algorithm = "rtn".',
        )
    with staged(out) as folder:
        job = {"job": "genai", "arguments": _arguments(checkpoint, folder, settings)}
        try:
            run_worker(job, folder.parent, what="onnxruntime-genai's model builder")
        except ArteError as error:
            if "is not currently supported" in error.message:
                raise InputError(
                    f"{checkpoint} is of a family that onnxruntime-genai's builder does not know",
                    "Export it to GGUF, or to the portable ONNX layout if optimum knows it.",
                ) from error
            raise
        standardize(folder / "model.onnx")
        tokenizer = copy_tokenizer(checkpoint, folder)
        require_sound(folder, checkpoint)
        refuse_leaks(folder, checkpoint, besides=tokenizer)
    return out


def _even_blocks(checkpoint: Path, block_size: int) -> bool:
    """Return whether every matrix' rows hold an even number of blocks: the builder's k-quant fails on an odd one."""
    matrices = [shape for shape in shapes_of(checkpoint).values() if len(shape) == 2]
    return all(shape[1] % (2 * block_size) == 0 for shape in matrices)


def _arguments(checkpoint: Path, folder: Path, settings: GenaiSettings) -> list[str]:
    options = ["hf_token=false", "hf_remote=false"]
    if settings.precision != "fp32":
        options += [f"block_size={settings.block_size}", f"accuracy_level={settings.accuracy_level}"]
    searched = settings.precision == "int4" and settings.algorithm != "rtn"
    if searched and _even_blocks(checkpoint, settings.block_size):
        # Plain rounding costs SmolLM2-135M a third of its perplexity, more than the gate lets pass. K-quant
        # scales, and 8 bits for the output and the layers that matter most, cost a tenth, and 30 % of size.
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

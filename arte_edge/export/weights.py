"""What an export asks of a checkpoint before it begins: its settings, its size, and that it is not quantized."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from arte_edge.errors import InputError
from arte_edge.models.weights import Weight, read_weights

__all__ = ["model_config", "parameter_count", "refuse_quantized", "shapes_of", "weights_dtype"]


def shapes_of(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, ``[n_out, n_in]`` for matrices, by name.

    Raises:
        InputError: the weights are damaged, missing, or not floats of 16 or 32 bits.
    """
    return {name: weight.shape for name, weight in _weights(checkpoint).items()}


def parameter_count(checkpoint: Path) -> int:
    """Return how many parameters a checkpoint holds; a tied output matrix counts once."""
    return sum(math.prod(shape) for shape in shapes_of(checkpoint).values())


def weights_dtype(checkpoint: Path) -> str:
    """Return the type that most parameters of a checkpoint have: F16, BF16 or F32."""
    totals: dict[str, int] = {}
    for weight in _weights(checkpoint).values():
        totals[weight.dtype] = totals.get(weight.dtype, 0) + math.prod(weight.shape)
    return max(totals, key=lambda dtype: totals[dtype])


def _weights(checkpoint: Path) -> dict[str, Weight]:
    weights = read_weights(checkpoint)
    if not weights:
        raise InputError(f"{checkpoint}: holds no tensors", "Fetch the checkpoint again.")
    return weights


def model_config(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json.

    Raises:
        InputError: missing, or not a JSON object.
    """
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON", "Give a transformers checkpoint.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a JSON object", "Give a transformers checkpoint.")
    return config


def refuse_quantized(checkpoint: Path, what: str) -> None:
    """Raise if a checkpoint's weights are quantized: a student's files are made from 16 bits.

    Raises:
        InputError: they are.
    """
    quantized = model_config(checkpoint).get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "some method") if isinstance(quantized, dict) else quantized
        raise InputError(
            f"{checkpoint}: {what} is quantized ({method}), and its rounding would stay in every file",
            "Give the 16-bit original" + (", with --base for an adapter." if "base" in what else "."),
        )

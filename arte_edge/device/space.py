"""Preflight checks before anything is copied: free disk space and memory for the model on the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arte_edge.cache import megabytes
from arte_edge.device.fit import fit, refuse
from arte_edge.device.shape import ModelShape
from arte_edge.device.survey import Survey
from arte_edge.errors import ArteError

__all__ = ["ENV_BYTES", "check_disk", "check_memory"]

# What the environment takes, by part, rounded up: 282 MB with xllamacpp, 527 MB with onnx beside it,
# measured with `du` on aarch64 (benchmarks/results/arm_emulation); pip needs the packed wheels beside it for
# a moment, and llama-cpp-python its objects.
ENV_BYTES = {"": 180_000_000, "xllamacpp": 140_000_000, "gguf": 600_000_000, "onnx": 330_000_000}
_MARGIN_BYTES = 100_000_000


def check_disk(found: Survey, need_bytes: int, host: str) -> None:
    """Raise ArteError if `need_bytes` and a margin do not fit below the work folder there."""
    if found.free_bytes < need_bytes + _MARGIN_BYTES:
        raise ArteError(
            f"{host}: not enough disk space: {megabytes(need_bytes)} would be copied, "
            f"{megabytes(found.free_bytes)} are free",
            f"Nothing was copied. Free some space; `arte-edge devices check … --clean` removes {found.work}.",
        )


def check_memory(found: Survey, models: Sequence[Path], tokens: int, host: str) -> None:
    """Raise InputError if a model with a cache of `tokens` tokens cannot fit into the device's memory."""
    if not (there := found.available_bytes or found.memory_bytes):
        return  # unknown
    for model in models:
        shape = ModelShape.of(model)
        needs = fit(shape, there, tokens)
        if needs.verdict == "no":
            raise refuse(shape, needs, host)

"""Where a checkpoint runs, and in which floats: a CUDA GPU, an Apple GPU (MPS) or the CPU.

bfloat16 where the GPU multiplies it: from Ampere on, and on ROCm. Older GPUs only emulate it, slowly, so they get
float16, as Apple's do; Gemma's activations overflow float16, so there it stays in float32. float64 is used on no
device: MPS has none.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from arte_edge.checkpoint import read_config
from arte_edge.errors import InputError

if TYPE_CHECKING:
    import torch

Floats = Literal["bfloat16", "float16", "float32"]
_DEVICES = ("auto", "cuda", "mps", "cpu")


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of this name; for auto ``ARTE_EDGE_DEVICE`` decides, then what there is.

    Raises InputError: no such device.
    """
    import torch

    name = os.environ.get("ARTE_EDGE_DEVICE", "auto") if name == "auto" else name
    if name.partition(":")[0] not in _DEVICES:
        raise InputError(f"ARTE_EDGE_DEVICE={name}: unknown", f"One of {', '.join(_DEVICES)}.")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, found in there.items() if found)
    elif not there[name.partition(":")[0]]:
        raise InputError(f"ARTE_EDGE_DEVICE={name}: torch finds no such device here", "Leave it unset.")
    return torch.device(name)


def fast_floats(device: torch.device, checkpoint: Path | None = None) -> Floats:
    """Return the floats for inference on `device` with a model of the family of `checkpoint`."""
    import torch

    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    if device.type == "cpu" or (checkpoint and overflows_float16(checkpoint)):
        return "float32"
    return "float16"


def training_floats(checkpoint: Path, *, frozen: bool = False) -> Floats:
    """Return the floats for the forward pass of a training; the weights that are trained are float32.

    Mixed precision of trained weights needs a CUDA GPU (`distill.train.sft.gradients_in_bfloat16` says why). A base
    that stays `frozen` under LoRA is bfloat16 on a CPU too, if that multiplies it: twice as fast.
    """
    device = pick_device()
    if device.type == "cuda":
        return fast_floats(device, checkpoint)
    return "bfloat16" if frozen and device.type == "cpu" and multiplies_bfloat16() else "float32"


def multiplies_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16, and ``ARTE_EDGE_DTYPE`` is not float32."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)  # an older torch has no such function
    able: dict[str, bool] = capabilities() if os.environ.get("ARTE_EDGE_DTYPE") != "float32" else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def overflows_float16(checkpoint: Path) -> bool:
    """Return whether the activations of a checkpoint's family exceed float16's 65,504."""
    return str(read_config(checkpoint).get("model_type", "")).startswith("gemma")


def empty_cache(device: torch.device) -> None:
    """Return freed memory of a GPU, or what glibc keeps of it, to the system."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)

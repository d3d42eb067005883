"""Write a LoRA adapter that PEFT saved as a GGUF adapter, which llama.cpp applies to the running base model.

So the aligned teacher needs no copy of its weights: the same quantized file that wrote the drafts writes the
tailored data, with a few megabytes beside it. Note that the adapter is then applied to quantized weights, not
to the 16-bit ones it was trained with; a run's probes measure the teacher as it will be used.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import InputError
from arte_edge.gguf.names import Layout, layout_of
from arte_edge.gguf.reader import Field, GgufHeader, read_model_header
from arte_edge.gguf.types import FLOAT32, STRING
from arte_edge.gguf.writer import Tensor, write_gguf

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor

__all__ = ["adapter_to_gguf"]

_PREFIX = "base_model.model."
# Settings of adapter_config.json that a GGUF adapter cannot express, so they must be off.
_PLAIN = ("use_dora", "use_rslora", "fan_in_fan_out", "alpha_pattern", "modules_to_save", "layer_replication")


def adapter_to_gguf(adapter_dir: Path, base_gguf: Path, out: Path) -> Path:
    """Write the PEFT LoRA in the folder `adapter_dir` as a GGUF adapter for `base_gguf`; return `out`.

    The matrices stay F32. The file appears whole or not at all.

    Raises:
        InputError: no readable adapter, one that is not plain LoRA on linear layers, a family
            we do not know, or an adapter of another model than `base_gguf`.
        ArteError: the disk is full, or a value is not finite.
    """
    base = read_model_header(base_gguf)
    layout = layout_of(base)
    config, matrices = _read_adapter(adapter_dir)
    _check_plain(adapter_dir, config)
    tensors: list[Tensor] = []
    for name in sorted(matrices):
        target, part = _target(adapter_dir, layout, name)
        _check_shape(adapter_dir, base, target, part, tuple(matrices[name].shape))
        tensors.append(_tensor(layout, target, part, matrices[name]))
    # llama.cpp scales by alpha / rank, the rank being that of each pair of matrices, as PEFT does
    (alpha,) = struct.unpack("<f", struct.pack("<f", float(config["lora_alpha"])))
    fields = {
        "general.type": Field(STRING, b"adapter"),
        "adapter.type": Field(STRING, b"lora"),
        "adapter.lora.alpha": Field(FLOAT32, alpha),
    }
    return write_gguf(out, layout.arch, fields, tensors)


def _read_adapter(adapter_dir: Path) -> tuple[dict[str, Any], dict[str, TorchTensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config: dict[str, Any] = json.loads((adapter_dir / "adapter_config.json").read_text("utf-8"))
        matrices: dict[str, TorchTensor] = load_file(adapter_dir / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{adapter_dir}: no readable adapter_config.json and adapter_model.safetensors",
            "Give the folder of a LoRA adapter as PEFT saves it.",
        ) from error
    return config, matrices


def _check_plain(adapter_dir: Path, config: dict[str, Any]) -> None:
    odd = [key for key in _PLAIN if config.get(key)]
    if config.get("peft_type") != "LORA":
        odd.insert(0, "peft_type")
    if odd:
        raise InputError(
            f"{adapter_dir / 'adapter_config.json'}: {odd[0]} = {config.get(odd[0])!r} cannot be expressed in GGUF",
            "Train plain LoRA, or merge the adapter into the weights.",
        )


def _target(adapter_dir: Path, layout: Layout, name: str) -> tuple[str, str]:
    """Return the GGUF weight that a matrix of the adapter changes, and which matrix it is, "a" or "b"."""
    for ending, part in ((".lora_A.weight", "a"), (".lora_B.weight", "b")):
        module = name.removeprefix(_PREFIX).removesuffix(ending)
        if name.endswith(ending) and (target := layout.gguf_name(f"{module}.weight")):
            return target, part
    raise InputError(
        f"{adapter_dir}: '{name}' has no place in a GGUF adapter",
        "Train LoRA on the linear layers alone, without biases or embeddings.",
    )


def _check_shape(adapter_dir: Path, base: GgufHeader, target: str, part: str, shape: tuple[int, ...]) -> None:
    weight = base.tensors.get(target)  # [n_out, n_in]; A is [rank, n_in], B is [n_out, rank]
    if weight is None or (shape[1] != weight.shape[1] if part == "a" else shape[0] != weight.shape[0]):
        raise InputError(
            f"{adapter_dir}: its matrix {part.upper()} {list(shape)} does not fit {target} of {base.path}",
            "Give the GGUF file of the model that the adapter was trained on.",
        )


def _tensor(layout: Layout, target: str, part: str, matrix: TorchTensor) -> Tensor:
    def load() -> NDArray[np.float32]:
        values: NDArray[np.float32] = matrix.float().numpy()
        return layout.to_gguf(target, values) if part == "b" else values  # the layout changes rows only

    loader: Callable[[], NDArray[np.float32]] = load
    return Tensor(f"{target}.lora_{part}", tuple(matrix.shape), "F32", loader)

"""Write a fine-tuned checkpoint as GGUF, with the metadata of the GGUF file its base came from.

Fine-tuning changes weights and nothing else: the tokenizer, the chat template and
the hyper-parameters are the base's. Taking them from the base file keeps the
student's prompts byte for byte those the base was measured with, and needs no
converter. It serves the run's own evaluation; `arte_edge.export` makes the files
that are shipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import InputError
from arte_edge.models.gguf_fields import Field, GgufFields, read_fields
from arte_edge.models.gguf_layout import Layout, checkpoint_family, layout_of
from arte_edge.models.gguf_write import Tensor, write_gguf

__all__ = ["checkpoint_to_gguf"]

# What is no longer true of the new file. `quantize.` holds paths of the machine that made the base.
_STALE = (
    "general.architecture",
    "general.file_type",
    "general.alignment",
    "general.quantized_by",
    "quantize.",
    "split.",
)
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # llama.cpp: LLAMA_FTYPE_ALL_F32, _MOSTLY_F16, _MOSTLY_BF16
_UINT32 = 4


def checkpoint_to_gguf(
    checkpoint: Path, base_gguf: Path, out: Path, dtype: Literal["F16", "BF16", "F32"] = "F16"
) -> Path:
    """Write the weights in the folder `checkpoint` to the GGUF file `out`; return `out`.

    Norms and biases stay F32, as llama.cpp wants them. The file appears whole or not at all.

    Raises:
        InputError: a family we do not know, or a checkpoint that is not a fine-tuned `base_gguf`
            (another architecture, other tensors, other shapes).
        ArteError: the disk is full, or a weight does not fit `dtype`.
    """
    base = read_fields(base_gguf)
    layout = layout_of(base)
    if (arch := checkpoint_family(checkpoint)) != layout.arch:
        raise InputError(f"{checkpoint}: is {arch}, but {base_gguf} is {layout.arch}", _SAME_BASE)
    sources = _tensor_files(checkpoint)
    names = _checked_names(base, layout, sources)
    tensors = [_tensor(base, layout, name, source, sources[source], dtype) for source, name in names.items()]
    tensors += [_copied(base, name) for name in base.shapes if name.startswith("rope_")]
    fields = {key: field for key, field in base.fields.items() if not key.startswith(_STALE)}
    fields["general.file_type"] = Field(_UINT32, _FILE_TYPES[dtype])
    return write_gguf(out, layout.arch, fields, tensors)


_SAME_BASE = "Give the GGUF file that the checkpoint was converted from before it was trained."


def _tensor_files(checkpoint: Path) -> dict[str, Path]:
    """Return the file of each tensor, for a checkpoint in one file or in shards."""
    from safetensors import SafetensorError, safe_open

    index = checkpoint / "model.safetensors.index.json"
    try:
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: checkpoint / Path(file).name for name, file in weight_map.items()}
        single = checkpoint / "model.safetensors"
        with safe_open(single, framework="pt") as file:
            return {name: single for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(
            f"{checkpoint}: no readable model.safetensors", "Give a whole checkpoint."
        ) from error


def _checked_names(base: GgufFields, layout: Layout, sources: dict[str, Path]) -> dict[str, str]:
    """Return checkpoint name -> GGUF name in the base's order, or raise for what does not match the base.

    `output.weight` may come or go: some files hold a tied output matrix twice.
    """
    names = {source: layout.gguf_name(source) for source in sources}
    unknown = [source for source, name in names.items() if name is None]
    written = {name: source for source, name in names.items() if name is not None}
    missing = {name for name in base.shapes if not name.startswith("rope_")} ^ set(written)
    if unknown or missing - {"output.weight"}:
        odd = (unknown + sorted(missing - {"output.weight"}))[0]
        raise InputError(f"'{odd}' is not both in the checkpoint and in {base.path}", _SAME_BASE)
    order = {name: position for position, name in enumerate(base.shapes)}
    return {written[name]: name for name in sorted(written, key=lambda name: order.get(name, -1))}


def _tensor(base: GgufFields, layout: Layout, name: str, source: str, file: Path, dtype: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        shape = tuple(tensors.get_slice(source).get_shape())
    expected = base.shapes.get(name, base.shapes["token_embd.weight"])
    if shape != expected:
        raise InputError(f"{file}: {source} is {list(shape)}, in {base.path} {list(expected)}", _SAME_BASE)
    kept = len(shape) == 1 or name.endswith("_norm.weight")
    return Tensor(name, shape, "F32" if kept else dtype, _loader(layout, name, source, file))


def _loader(layout: Layout, name: str, source: str, file: Path) -> Callable[[], NDArray[np.float32]]:
    def load() -> NDArray[np.float32]:
        import torch
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:  # through torch: numpy has no bfloat16
            values: NDArray[np.float32] = tensors.get_tensor(source).to(torch.float32).numpy()
        return layout.to_gguf(name, values)

    return load


def _copied(base: GgufFields, name: str) -> Tensor:
    """Return a tensor that only the base holds: rotary factors, derived from the config elsewhere."""

    def load() -> NDArray[np.float32]:
        from gguf import GGUFReader

        values = next(t.data for t in GGUFReader(base.path).tensors if t.name == name)
        return np.array(values, dtype=np.float32)

    return Tensor(name, base.shapes[name], "F32", load)

"""Write a GGUF file tensor by tensor, whole or not at all.

One tensor is in memory at a time, and the file appears under its name only when
its last byte is on disk, so that a killed run never leaves half a model behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import ArteError
from arte_edge.models.gguf_fields import Field

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["Tensor", "write_gguf"]


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: its values are asked for when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # F32 | F16 | BF16
    load: Callable[[], NDArray[np.float32]]


def write_gguf(out: Path, arch: str, fields: Mapping[str, Field], tensors: Sequence[Tensor]) -> Path:
    """Write `fields` (without ``general.architecture``) and `tensors` to `out`; return `out`.

    Raises:
        ArteError: the disk is full or not writable, or a value does not fit its type.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")  # the next attempt overwrites a killed one's
    try:
        _write(partial, arch, fields, tensors)
        partial.replace(out)
    except OSError as error:
        raise ArteError(
            f"{out}: {error.strerror or error}", "Free some space or choose another folder."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return out


def _write(path: Path, arch: str, fields: Mapping[str, Field], tensors: Sequence[Tensor]) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, arch)
    for key, field in fields.items():
        _add_field(writer, key, field)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.dtype]
        n_bytes = int(np.prod(tensor.shape)) * (4 if tensor.dtype == "F32" else 2)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_encoded(tensor))
        writer.flush()
        for file in writer.fout or ():
            os.fsync(file.fileno())
    finally:
        writer.close()


def _add_field(writer: GGUFWriter, key: str, field: Field) -> None:
    from gguf import GGUFValueType

    item_kind = None if field.item_kind is None else GGUFValueType(field.item_kind)
    writer.add_key_value(key, field.value, GGUFValueType(field.kind), item_kind)


def _encoded(tensor: Tensor) -> NDArray[np.generic]:
    """Return the values as the bytes of the tensor's type.

    Raises:
        ArteError: a value is not finite, before or after rounding to the type.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.ascontiguousarray(tensor.load(), dtype=np.float32)
    with np.errstate(over="ignore"):
        encoded: NDArray[np.generic] = quantize(values, GGMLQuantizationType[tensor.dtype])
    finite = np.isfinite(encoded).all() if tensor.dtype == "F16" else np.isfinite(values).all()
    if not finite:
        raise ArteError(
            f"{tensor.name}: holds values that are not finite in {tensor.dtype}",
            "If the checkpoint itself is sound, write it as BF16; else the training diverged.",
        )
    return encoded

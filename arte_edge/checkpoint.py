"""Read config.json and weights of a transformers checkpoint without torch.

The `safetensors` package has no bfloat16 for numpy, and importing torch takes longer than converting a small
model. The format is a JSON header followed by the raw values (https://huggingface.co/docs/safetensors); numpy
reads them in blocks of rows, bfloat16 as `uint16`.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import InputError
from arte_edge.files import json_loads, read_json

__all__ = [
    "Values",
    "Weight",
    "parameter_count",
    "read_config",
    "read_weights",
    "reject_quantized",
    "shapes_of",
    "weights_dtype",
]

# float32, float16, or uint16 with the bits of bfloat16
Values = NDArray[Any]

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors package
_BLOCK_BYTES = 16_000_000


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint, not loaded. `shape` is ``[n_out, n_in]``, or ``[n]``."""

    name: str
    path: Path
    dtype: str  # F32 | F16 | BF16
    shape: tuple[int, ...]
    offset_bytes: int

    def load(self) -> Values:
        """Return all values ``[*shape]``."""
        return self._read(0, math.prod(self.shape)).reshape(self.shape)

    def blocks(self) -> Iterator[Values]:
        """Yield the values in order as complete rows, about 16 MB at a time."""
        row = math.prod(self.shape[1:])
        n_row = max(1, _BLOCK_BYTES // max(1, row * _DTYPES[self.dtype].itemsize))
        for start in range(0, self.shape[0] if self.shape else 0, n_row):
            count = min(n_row, self.shape[0] - start)
            yield self._read(start * row, count * row).reshape(count, *self.shape[1:])

    def _read(self, start: int, count: int) -> Values:
        dtype = _DTYPES[self.dtype]
        values: Values = np.fromfile(
            self.path, dtype, count, offset=self.offset_bytes + start * dtype.itemsize
        )
        if len(values) != count:
            raise InputError(f"{self.path}: truncated in {self.name}", "Download the checkpoint again.")
        return values


def read_weights(checkpoint: Path) -> dict[str, Weight]:
    """Return the tensors of a checkpoint (one file or shards) by name, without their values.

    Raises:
        InputError: no safetensors, a shard is missing or truncated, a file is damaged, or has 8-bit floats or
            integers.
    """
    index = checkpoint / "model.safetensors.index.json"
    if not index.is_file():
        return _read_file(checkpoint / "model.safetensors")
    try:
        weight_map: dict[str, str] = json_loads(index.read_text("utf-8"))["weight_map"]
        files = sorted({Path(file).name for file in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not a weights index", "Download the checkpoint again.") from error
    found: dict[str, Weight] = {}
    for file in files:
        found |= _read_file(checkpoint / file)
    if missing := sorted(set(weight_map) - set(found)):
        raise InputError(
            f"{checkpoint}: {missing[0]} is in the index but not in a file", "Download the checkpoint again."
        )
    return found


def _read_file(path: Path) -> dict[str, Weight]:
    """Return the tensors of one file; check that they are inside it."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_HEADER_LIMIT_BYTES, size_bytes - 8):
                raise ValueError("cut short")
            header = json_loads(file.read(length))
        rows = {name: row for name, row in header.items() if name != "__metadata__"}
        return {name: _weight(path, name, row, 8 + length, size_bytes) for name, row in rows.items()}
    except OSError as error:
        raise InputError(
            f"{path}: no readable weights ({error.strerror})", "Give a complete checkpoint: *.safetensors."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(
            f"{path}: not a readable safetensors file ({error})", "Download the checkpoint again."
        ) from error


def _weight(path: Path, name: str, row: dict[str, Any], data_offset: int, size_bytes: int) -> Weight:
    kind, shape = row["dtype"], tuple(int(n) for n in row["shape"])
    start, end = row["data_offsets"]
    if kind not in _DTYPES:
        raise InputError(
            f"{path}: {name} is {kind}, not a 16- or 32-bit float",
            "Give the checkpoint before quantization.",
        )
    if (
        end - start != math.prod(shape) * _DTYPES[kind].itemsize
        or start < 0
        or data_offset + end > size_bytes
    ):
        raise ValueError(f"{name} is outside the file: cut short?")
    return Weight(name, path, kind, shape, data_offset + start)


def shapes_of(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, ``[n_out, n_in]`` for matrices, by name.

    Raises InputError: the weights are damaged, missing, or not floats of 16 or 32 bits.
    """
    return {name: weight.shape for name, weight in _weights(checkpoint).items()}


def parameter_count(checkpoint: Path) -> int:
    """Return the number of parameters of a checkpoint; a tied output matrix counts once."""
    return sum(math.prod(shape) for shape in shapes_of(checkpoint).values())


def weights_dtype(checkpoint: Path) -> str:
    """Return the type of most parameters of a checkpoint: F16, BF16 or F32."""
    totals: Counter[str] = Counter()
    for weight in _weights(checkpoint).values():
        totals[weight.dtype] += math.prod(weight.shape)
    return totals.most_common(1)[0][0]


def _weights(checkpoint: Path) -> dict[str, Weight]:
    weights = read_weights(checkpoint)
    if not weights:
        raise InputError(f"{checkpoint}: contains no tensors", "Download the checkpoint again.")
    return weights


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Return the config.json of a checkpoint. Raises InputError: missing, or not a JSON object."""
    return read_json(checkpoint / "config.json", "Give a transformers checkpoint.", required=True)


def reject_quantized(checkpoint: Path, what: str) -> None:
    """Raise `InputError` if a checkpoint's weights are quantized; files are exported from 16 bits."""
    quantized = read_config(checkpoint).get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "some method") if isinstance(quantized, dict) else quantized
        raise InputError(
            f"{checkpoint}: {what} is quantized ({method}), and every file would inherit its rounding errors",
            "Give the 16-bit original" + (", with --base for an adapter." if "base" in what else "."),
        )

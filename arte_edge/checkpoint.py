"""Read config.json and weights of a transformers checkpoint without torch, and set its chat template.

The `safetensors` package has no bfloat16 for numpy, and importing torch takes longer than converting a small
model. The format is a JSON header followed by the raw values (https://huggingface.co/docs/safetensors); numpy
reads them in blocks of rows, bfloat16 as `uint16`.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.cache import write_atomic
from arte_edge.errors import InputError, reading
from arte_edge.files import json_loads, read_json
from arte_edge.model_folder import MORE_TEMPLATES, look

# float32, float16, or uint16 with the bits of bfloat16
Values = NDArray[Any]

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors package
_BLOCK_BYTES = 16_000_000
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_AGAIN = "Download or save the checkpoint again."


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
        values: Values = np.fromfile(self.path, dtype, count, offset=self.offset_bytes + start * dtype.itemsize)
        if len(values) != count:
            raise InputError(f"{self.path}: truncated in {self.name}", _AGAIN)
        return values


def read_weights(checkpoint: Path) -> dict[str, Weight]:
    """Return the tensors of a checkpoint (one file or shards) by name, without their values.

    Raises InputError: `look` finds no checkpoint, a file is damaged, or has 8-bit floats or integers.
    """
    found: dict[str, Weight] = {}
    holds = look(checkpoint)
    if holds.kind != "checkpoint":
        raise InputError(f"{checkpoint}: holds no checkpoint", "It has config.json and model.safetensors.")
    for path in holds.weights:
        for name, weight in read_tensors(path).items():
            if name in found:
                raise InputError(f"{path}: {name} is in {found[name].path.name} too", _AGAIN)
            found[name] = weight
    if missing := sorted(holds.tensors - found.keys()):
        raise InputError(f"{checkpoint}: {missing[0]} is in the index but not in a file", _AGAIN)
    if not found:
        raise InputError(f"{checkpoint}: contains no tensors", _AGAIN)
    return found


def read_tensors(path: Path) -> dict[str, Weight]:
    """Return the tensors of one safetensors file; an `InputError` if one is not inside it."""
    rows, data_offset = read_header(path)
    size_bytes = path.stat().st_size
    with reading(path, _AGAIN):
        return {name: _weight(path, name, row, data_offset, size_bytes) for name, row in rows.items()}


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return what a safetensors file says of each tensor, and where its data begins; an `InputError` if damaged."""
    try:
        with reading(path, _AGAIN), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(_HEADER_LIMIT_BYTES, path.stat().st_size - 8):
                raise ValueError("cut short")
            rows = json_loads(file.read(length)).items()
            return {name: row for name, row in rows if name != "__metadata__"}, 8 + length
    except OSError as error:
        raise InputError(f"{path}: no readable weights ({error.strerror})", _AGAIN) from error


def _weight(path: Path, name: str, row: dict[str, Any], data_offset: int, size_bytes: int) -> Weight:
    kind, shape = row["dtype"], tuple(int(n) for n in row["shape"])
    start, end = row["data_offsets"]
    if kind not in _DTYPES:
        raise InputError(
            f"{path}: {name} is {kind}, not a 16- or 32-bit float", "Give the checkpoint before quantization."
        )
    size_fits = end - start == math.prod(shape) * _DTYPES[kind].itemsize and min(shape, default=0) >= 0
    if not size_fits or start < 0 or data_offset + end > size_bytes:
        raise ValueError(f"{name} is outside the file: cut short?")
    return Weight(name, path, kind, shape, data_offset + start)


def shapes_of(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, ``[n_out, n_in]`` for matrices, by name.

    Raises InputError: the weights are damaged, missing, or not floats of 16 or 32 bits.
    """
    return {name: weight.shape for name, weight in read_weights(checkpoint).items()}


def dtype_and_count(checkpoint: Path) -> tuple[str, int]:
    """Return the type of most parameters (F16, BF16 or F32) and their number; a tied output matrix counts once."""
    totals: Counter[str] = Counter()
    for weight in read_weights(checkpoint).values():
        totals[weight.dtype] += math.prod(weight.shape)
    return totals.most_common(1)[0][0], totals.total()


def check_tied(checkpoint: Path, default: bool = False) -> None:
    """Raise if config.json (by `default`) ties the output matrix to the embedding and the weights hold another one.

    transformers 5 then reads both, transformers 4 and most runtimes the embedding alone.
    """
    config = read_config(checkpoint)
    if not config.get("tie_word_embeddings", default) or config.get("quantization_config"):
        return
    weights = read_weights(checkpoint)
    embedding, output = weights.get(EMBEDDING), weights.get(OUTPUT)
    if embedding is None or output is None:
        return
    same = (embedding.shape, embedding.dtype) == (output.shape, output.dtype)
    if not same or not all(map(np.array_equal, embedding.blocks(), output.blocks())):
        raise InputError(
            f"{checkpoint / 'config.json'}: tie_word_embeddings is true, but {OUTPUT} differs from the embedding",
            "If the output matrix was trained, set tie_word_embeddings to false; else remove the tensor.",
        )


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


def write_chat_template(folder: Path, template: str) -> None:
    """Make `template` the only chat template of the checkpoint in `folder`.

    It stays where transformers finds the present one: in tokenizer_config.json, else in chat_template.jinja; of the two
    onnxruntime-genai would read the other one. Other named templates, such as the one for tools, go: they would ask in
    another way than the model was tuned on.

    Raises ArteError: tokenizer_config.json is damaged, or the folder cannot be written.
    """
    config, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = read_json(config)
    is_key = bool(settings.pop("chat_template", None))
    if is_key and not own.exists():
        settings["chat_template"] = template
    else:
        write_atomic(own, template.encode())
    if is_key:
        write_atomic(config, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
    (folder / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)

"""Which names and shapes an exported ONNX decoder has, whichever exporter wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arte_edge.errors import InputError
from arte_edge.export.onnx_cache import CacheTensor
from arte_edge.export.onnx_check import model_file
from arte_edge.export.onnx_tokens import end_tokens, read_json

__all__ = ["Layout", "read_layout"]

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


@dataclass(frozen=True)
class Layout:
    """How to run one exported folder.

    Attributes:
        path: the ONNX file.
        past_key, past_value, present_key, present_value: cache names, %d stands for the layer.
        head_size: size of an attention head, 0 if the graph says it itself.
        is_shared: past and present may be one buffer.
        context_length: tokens the model was made for, 0 if not known.
        n_vocab: rows of the embedding, for a graph that does not say it.
        stop_tokens: ids that end a text.
    """

    path: Path
    past_key: str
    past_value: str
    present_key: str
    present_value: str
    head_size: int
    is_shared: bool
    context_length: int
    n_vocab: int
    stop_tokens: frozenset[int]

    def cache_tensors(self, inputs: Sequence[Any]) -> list[CacheTensor]:
        """Return the cached tensors of a session's `inputs` (name, shape, type), layer by layer.

        Raises:
            InputError: the graph has no cache, or one of a kind that cannot be bound.
        """
        by_name = {value.name: value for value in inputs}
        tensors: list[CacheTensor] = []
        while (key := self.past_key.replace("%d", str(layer := len(tensors) // 2))) in by_name:
            for past, present in ((self.past_key, self.present_key), (self.past_value, self.present_value)):
                value = by_name[past.replace("%d", str(layer))]
                heads, size = value.shape[1], value.shape[3] if isinstance(value.shape[3], int) else 0
                if value.type not in _DTYPES or not isinstance(heads, int) or not (size or self.head_size):
                    raise InputError(
                        f"{self.path.name}: cache {value.name} is {value.type} {value.shape}",
                        "Only caches of fp32 or fp16 with known heads can be run here.",
                    )
                name = present.replace("%d", str(layer))
                tensors.append(
                    CacheTensor(value.name, name, heads, size or self.head_size, _DTYPES[value.type])
                )
        if not tensors:
            raise InputError(f"{self.path.name} has no key-value cache: {key} is missing", "Export it again.")
        return tensors


def read_layout(folder: Path) -> Layout:
    """Return how to run the exported `folder`, from its config files.

    Raises:
        InputError: it holds no ONNX model, or its config cannot be read.
    """
    path = model_file(folder)
    if not path.is_file():
        raise InputError(f"{path} does not exist", "Name a folder that `arte-edge export` wrote.")
    config = read_json(folder / "genai_config.json")
    if not config:
        plain = read_json(folder / "config.json")
        names = ("past_key_values.%d.key", "past_key_values.%d.value", "present.%d.key", "present.%d.value")
        limit = int(plain.get("max_position_embeddings", 0))
        return Layout(path, *names, 0, False, limit, int(plain.get("vocab_size", 0)), end_tokens(folder))
    model = config.get("model", {})
    decoder = model.get("decoder", {})
    inputs, outputs = decoder.get("inputs", {}), decoder.get("outputs", {})
    ids = model.get("eos_token_id")
    try:
        names = (
            *(inputs["past_key_names"], inputs["past_value_names"]),
            *(outputs["present_key_names"], outputs["present_value_names"]),
        )
    except KeyError as error:
        raise InputError(f"{folder}/genai_config.json has no {error}", "Export the model again.") from error
    return Layout(
        path,
        *names,
        head_size=int(decoder.get("head_size", 0)),
        is_shared=bool(config.get("search", {}).get("past_present_share_buffer", False)),
        context_length=int(model.get("context_length", 0)),
        n_vocab=int(model.get("vocab_size", 0)),
        stop_tokens=frozenset([ids] if isinstance(ids, int) else ids or ()),
    )

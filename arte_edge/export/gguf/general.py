"""``general.*``: what a file says of itself to people and to hubs, from the checkpoint's own card and settings.

Names of folders are left out, though llama.cpp's converter takes them: a run's
folder says nothing about the model, and a path of one's own machine has no place in
a published file. The exporter adds its own keys over these.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from arte_edge.errors import InputError
from arte_edge.export.gguf.checkpoint import Checkpoint
from arte_edge.export.gguf.hparams import STRING, UINT32
from arte_edge.models.gguf_fields import Field
from arte_edge.models.gguf_write import FILE_TYPES, Tensor

__all__ = ["general_fields"]

_ARRAY = 9
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


def general_fields(checkpoint: Checkpoint, tensors: Sequence[Tensor], dtype: str) -> dict[str, Field]:
    """Return ``general.*`` for a file with these tensors.

    Raises:
        InputError: the model card's head is no YAML.
    """
    import gguf

    n_parameter = sum(math.prod(tensor.shape) for tensor in tensors)
    try:
        card = gguf.Metadata.load_model_card(checkpoint.folder)
    except Exception as error:  # yaml's errors, of a package that is gguf's own business
        readme = checkpoint.folder / "README.md"
        raise InputError(f"{readme}: its head is no valid YAML", "Mend or remove it.") from error
    chatter = logging.getLogger("metadata")
    chatter.setLevel(logging.ERROR)
    about = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, {}, None, n_parameter)
    _add_sampling(about, gguf.Metadata.load_generation_config(checkpoint.folder))
    about.size_label = about.size_label or gguf.size_label(n_parameter, n_parameter, 0, 0)
    about.name = about.name or f"{checkpoint.family.title} {about.size_label}"
    writer = gguf.GGUFWriter(None, checkpoint.family.arch)
    about.set_gguf_meta_model(writer)
    found = {key: _field(value) for key, value in writer.kv_data[0].items() if key != "general.architecture"}
    return {
        "general.type": Field(STRING, b"model"),
        **found,
        "general.file_type": Field(UINT32, FILE_TYPES[dtype]),
        "general.quantization_version": Field(UINT32, _QUANTIZATION_VERSION),
    }


# generation_config.json -> gguf.Metadata
_SAMPLING = {
    "top_k": "sampling_top_k",
    "top_p": "sampling_top_p",
    "min_p": "sampling_min_p",
    "temperature": "sampling_temp",
}


def _add_sampling(about: Any, generation: dict[str, Any]) -> None:
    """Take over the sampling that the model's makers recommend."""
    for name, attribute in _SAMPLING.items():
        value = generation.get(name)
        if isinstance(value, int | float) and hasattr(about, attribute):
            setattr(about, attribute, value)


def _field(value: Any) -> Field:
    """Return a `gguf` package's value as a field of ours."""
    from gguf import GGUFValueType

    kind, content = GGUFValueType(value.type), value.value
    if kind != GGUFValueType.ARRAY:
        return Field(int(kind), content.encode() if isinstance(content, str) else content)
    item = GGUFValueType.get_type(content[0])
    items = [part.encode() if isinstance(part, str) else part for part in content]
    return Field(_ARRAY, items, int(item))

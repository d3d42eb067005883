"""genai_config.json, checked: what onnxruntime-genai's builder says of a decoder and its graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, StrictInt, StrictStr

from arte_edge.files import read_json, validated

GENAI = "genai_config.json"
_Name = Annotated[StrictStr, Field(min_length=1)]
_Size = Annotated[StrictInt, Field(ge=0, lt=2**31)]


class _Names(BaseModel, extra="allow"):
    __pydantic_extra__: dict[str, _Name]

    def expanded(self, layers: int) -> Iterator[str]:
        """Yield the names in the graph; %d stands for a layer."""
        for name in self.model_dump(exclude_unset=True).values():
            yield from (name.replace("%d", str(i)) for i in range(layers)) if "%d" in name else (name,)


class _Inputs(_Names):
    past_key_names: _Name
    past_value_names: _Name


class _Outputs(_Names):
    present_key_names: _Name
    present_value_names: _Name
    logits: _Name = "logits"


class _Decoder(BaseModel):
    inputs: _Inputs
    outputs: _Outputs
    filename: Annotated[StrictStr, Field(max_length=100, pattern=r"^[^/\\]+$")] = "model.onnx"
    num_hidden_layers: Annotated[StrictInt, Field(gt=0, lt=10_000)]
    num_key_value_heads: _Size | None = None
    head_size: Annotated[StrictInt, Field(ge=0, lt=1 << 16)] = 0


class GenaiModel(BaseModel):
    """The model that the file describes; 0 for what it does not say."""

    decoder: _Decoder
    vocab_size: Annotated[StrictInt, Field(ge=0, lt=1 << 24)] = 0
    context_length: _Size = 0
    eos_token_id: _Size | list[_Size] = []

    @property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset(self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id])


class _Search(BaseModel):
    past_present_share_buffer: bool = False


class _File(BaseModel):
    model: GenaiModel
    search: _Search = _Search()


def read_genai_config(folder: Path) -> tuple[GenaiModel, bool]:
    """Return the model, and whether past and present may be one buffer. Raises InputError, with the keys at fault."""
    path = folder / GENAI
    found = validated(_File, read_json(path), str(path), "Export or copy the folder again.")
    return found.model, found.search.past_present_share_buffer

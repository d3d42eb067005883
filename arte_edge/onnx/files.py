"""What the files of an ONNX folder say, read without torch or transformers: decoder, tokenizer and stop tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, StrictInt, StrictStr

from arte_edge.errors import InputError, reading
from arte_edge.files import read_json, validated
from arte_edge.model_folder import end_ids, token_text

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


_LIMIT = 2**31  # of sizes and ids


def read_number(path: Path, config: Mapping[str, Any], key: str) -> int:
    """Return a size in a JSON file, 0 if it has none. Raises InputError for what no size can be."""
    value = config.get(key) or 0
    if not isinstance(value, int) or not 0 <= value < _LIMIT:
        raise InputError(f"{path}: {key} is {str(value)[:40]!r}, not a size", "Export or copy the folder again.")
    return value


def added_tokens(folder: Path) -> dict[int, str]:
    """Return the added tokens of tokenizer.json by id, in the order of their ids. Raises InputError if damaged."""
    path = folder / "tokenizer.json"
    with reading(path, "Copy the folder again."):
        rows = read_json(path).get("added_tokens") or ()
        return dict(sorted((int(row["id"]), str(row["content"])) for row in rows))


def end_tokens(checkpoint: Path) -> frozenset[int]:
    """Return the stop tokens of a checkpoint: those of its generation config (else config.json) and tokenizer.

    A chat model ends each turn with the tokenizer's ``eos_token``, which configs often do not list.
    """
    own = token_text(read_json(checkpoint / "tokenizer_config.json").get("eos_token"))
    added = {text: token for token, text in added_tokens(checkpoint).items()}
    return frozenset(end_ids(checkpoint)) | (frozenset([added[own]]) if own in added else frozenset())


class FileTokenizer:
    """The tokenizer of a folder, through the `tokenizers` library and tokenizer.json.

    Attributes:
        bos: text of the BOS token that the tokenizer adds, empty if it adds none.
    """

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer. Raises InputError: tokenizer.json is missing or damaged."""
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
            # Settings of a call before it was saved, which tokenizer.json keeps
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(f"{path} cannot be read as a tokenizer: {error}", "Copy the folder again.") from error
        config = read_json(folder / "tokenizer_config.json")
        bos = token_text(config.get("bos_token"))
        bos_id = self._tokenizer.token_to_id(bos) if bos else None
        adds_bos = bos_id is not None and self._tokenizer.encode("a").ids[:1] == [bos_id]
        self.bos = bos if adds_bos else ""
        self._bos_ids = [bos_id] if adds_bos and bos_id is not None else []

    def tokens(self, text: str) -> list[int]:
        """Return the ids of `text`, special tokens parsed, with the BOS that the model expects."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if self.bos and text.startswith(self.bos) else [*self._bos_ids, *ids]

    def text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of `ids`; special tokens are left out unless `special`."""
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=not special)
        return decoded

"""Against llama.cpp's own converter, where the user names a checkout: ``ARTE_EDGE_LLAMA_CPP=DIR``.

Its version of llama-cpp-python 0.3.36 is the one compared with; it needs the package sentencepiece.
"""

import json
import os
import struct
from pathlib import Path

import pytest

from arte_edge.gguf.convert import convert, convert_with_llama_cpp
from arte_edge.gguf.reader import read_model_header
from arte_edge.models import resolve

CHECKOUT = os.environ.get("ARTE_EDGE_LLAMA_CPP", "")
# The script reads these from the name of the checkpoint's folder; we do not.
FROM_THE_FOLDER = {f"general.{key}" for key in ("name", "basename", "finetune", "version", "size_label")}
# What llama.cpp takes anyway where the script leaves it out; we say it, so that no default can change it.
SAID_BY_US = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False}
SAID_BY_THE_SCRIPT = {"tokenizer.ggml.add_sep_token": False}  # llama.cpp's default for both tokenizers


def _varint(number: int) -> bytes:
    low = number & 0x7F
    return bytes([low | 0x80]) + _varint(number >> 7) if number > 0x7F else bytes([low])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _with_sentencepiece(checkpoint: Path, gguf: Path, out: Path) -> Path:
    """Return a copy of a checkpoint with the tokenizer.model whose contents its GGUF still has."""
    out.mkdir()
    for file in checkpoint.iterdir():
        (out / file.name).symlink_to(file)
    fields = read_model_header(gguf).fields
    columns = (fields[f"tokenizer.ggml.{key}"].value for key in ("tokens", "scores", "token_type"))
    pieces, rows = [], list(zip(*columns, strict=True))
    for text, score, kind in rows:
        row = _message(1, text.replace(b" ", "▁".encode())) + b"\x15" + struct.pack("<f", score)
        pieces.append(_message(1, row + b"\x18" + bytes([kind])))
    # model_type BPE, byte_fallback, and the ids of unk, bos, eos and pad
    numbers = {3: 2, 35: 1, 40: 3, 41: 2, 42: 1, 43: 0}
    trainer = _message(2, b"".join(_number(field, value) for field, value in numbers.items()))
    normalizer = _message(3, _message(1, b"identity") + b"\x18\x00\x20\x00\x28\x01")
    added = {
        str(token): {"content": text.decode(), "special": kind == 3}
        for token, (text, _, kind) in enumerate(rows)
        if kind in (3, 4)
    }
    settings = json.loads((out / "tokenizer_config.json").read_text("utf-8"))
    (out / "tokenizer_config.json").unlink()  # the link
    settings = json.dumps(settings | {"added_tokens_decoder": added})
    (out / "tokenizer_config.json").write_text(settings, "utf-8")
    (out / "tokenizer.model").write_bytes(b"".join(pieces) + trainer + normalizer)
    return out


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(not CHECKOUT, reason="ARTE_EDGE_LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "gemma-3-270m"])
def test_every_tensor_and_key_is_that_of_llama_cpps_converter(name: str, tmp_path: Path) -> None:
    import gguf

    model = resolve(name)
    checkpoint = model.checkpoint()
    if name.startswith("gemma"):
        assert model.gguf
        checkpoint = _with_sentencepiece(checkpoint, model.gguf, tmp_path / name)
    ours = convert(checkpoint, tmp_path / "ours.gguf")
    theirs = convert_with_llama_cpp(Path(CHECKOUT), checkpoint, tmp_path / "theirs.gguf")
    one, two = read_model_header(ours), read_model_header(theirs)
    assert one.shapes == two.shapes
    pairs = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    for tensor in gguf.GGUFReader(ours).tensors:
        other = pairs.pop(tensor.name)
        assert tensor.tensor_type == other.tensor_type
        assert tensor.data.tobytes() == other.data.tobytes(), tensor.name
    assert not pairs
    differ = {key for key in one.fields | two.fields if one.fields.get(key) != two.fields.get(key)}
    differ -= FROM_THE_FOLDER
    assert differ <= {*SAID_BY_US, *SAID_BY_THE_SCRIPT}
    assert {key: one.fields[key].value for key in differ - two.fields.keys()}.items() <= SAID_BY_US.items()
    assert {key: two.fields[key].value for key in differ & two.fields.keys()}.items() <= SAID_BY_THE_SCRIPT.items()

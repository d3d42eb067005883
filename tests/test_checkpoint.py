import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Patch, write_safetensors, write_tokenizer

from arte_edge.checkpoint import dtype_and_count, read_weights, reject_quantized, shapes_of, write_chat_template
from arte_edge.errors import ArteError, InputError
from arte_edge.gguf.writer import encode, widened
from arte_edge.model_folder import chat_templates, tokenizer_files


def save(folder: Path, **tensors: Any) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file({name: torch.as_tensor(value) for name, value in tensors.items()}, folder / "model.safetensors")


def test_blocks_and_the_whole_are_what_safetensors_reads(tmp_path: Path, monkeypatch: Patch) -> None:
    import torch

    torch.manual_seed(1)
    wide, half = torch.randn(70, 33), torch.randn(9).half()
    save(tmp_path, wide=wide, narrow=wide.bfloat16(), half=half)
    monkeypatch.setattr("arte_edge.checkpoint._BLOCK_BYTES", 33 * 4 * 8)
    found = read_weights(tmp_path)
    assert len(list(found["wide"].blocks())) == 9
    for name, expected in (("wide", wide), ("narrow", wide.bfloat16()), ("half", half)):
        whole = widened(found[name].load())
        assert np.array_equal(whole, expected.float().numpy())
        assert np.array_equal(np.concatenate([widened(block) for block in found[name].blocks()]), whole)


def test_every_bfloat16_becomes_the_float16_that_rounding_through_float32_gives() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[np.isfinite(widened(bits))]
    values = widened(finite)
    fits = np.abs(values) < 65520
    got = encode(finite[fits], "F16", "x")
    assert np.array_equal(got, values[fits].astype(np.float16).view(np.uint16))
    with pytest.raises(ArteError, match="not finite in F16"):
        encode(finite[~fits], "F16", "x")


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_float32_becomes_the_bfloat16_that_ggml_rounds_to(values: list[float]) -> None:
    import gguf

    row = np.array(values, dtype=np.float32)
    expected = gguf.quantize(row, gguf.GGMLQuantizationType.BF16).view(np.uint16)
    if np.isfinite(widened(expected)).all():
        assert np.array_equal(encode(row, "BF16", "x"), expected)
    else:
        with pytest.raises(ArteError):
            encode(row, "BF16", "x")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_rejected_by_name(dtype: str, value: float) -> None:
    row = np.array([1.0, value], dtype=np.float32)
    for block in (row, row.astype(np.float16), (row.view(np.uint32) >> 16).astype(np.uint16)):
        with pytest.raises(ArteError, match=r"blk\.0"):
            encode(block, dtype, "blk.0")


def test_unknown_and_missing_tensors_are_rejected(tmp_path: Path) -> None:
    save(tmp_path, packed=np.zeros((4, 4), dtype=np.uint8))
    with pytest.raises(InputError, match="packed is U8"):
        read_weights(tmp_path)
    with pytest.raises(InputError, match="no tensors"):
        dtype_and_count(write_safetensors(tmp_path, {}))


@pytest.mark.parametrize("offsets", [[0, 8], [0, 64], [-4, 12], [100, 116]])
def test_a_tensor_outside_its_file_is_rejected(offsets: list[int], tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": offsets}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(InputError, match="outside the file"):
        read_weights(tmp_path)


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    write_safetensors(tmp_path, {"a.weight": ("BF16", [6, 4]), "norm.weight": ("F32", [4])})
    assert shapes_of(tmp_path) == {"a.weight": (6, 4), "norm.weight": (4,)}
    assert dtype_and_count(tmp_path) == ("BF16", 28)


def test_a_checkpoint_in_four_bits_is_rejected(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    write_safetensors(tmp_path, {"a": ("F16", [2, 2])}, **config)
    with pytest.raises(InputError, match="bitsandbytes") as error:
        reject_quantized(tmp_path, "the adapter's base")
    assert "--base" in error.value.hint
    reject_quantized(write_safetensors(tmp_path, {"a": ("F16", [2, 2])}), "the checkpoint")


NAMED = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "old"}]


@pytest.mark.parametrize("key", [None, "old", NAMED])
@pytest.mark.parametrize("files", [[], ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]])
@pytest.mark.parametrize("old_processor", [False, True])
def test_a_new_template_is_the_only_one_wherever_the_old_ones_were(
    key: Any, files: list[str], old_processor: bool, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, template=None)
    config = tmp_path / "tokenizer_config.json"
    before = json.loads(config.read_text())
    config.write_text(json.dumps(before | ({"chat_template": key} if key else {})))
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    if old_processor:
        (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    write_chat_template(tmp_path, "{{ 'ä\\n' }}")
    assert chat_templates(tokenizer_files(tmp_path)) == {"default": "{{ 'ä\\n' }}"}
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ 'ä\\n' }}"
    assert "old" not in "".join(path.read_text() for path in tmp_path.rglob("*template*") if path.is_file())
    after = json.loads(config.read_text())
    assert ("chat_template" in after) is (key is not None and not files)
    after.pop("chat_template", None)
    assert after == before

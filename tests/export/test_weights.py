from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from arte_edge.errors import InputError
from arte_edge.export.weights import model_config, parameter_count, refuse_quantized, shapes_of, weights_dtype


def write(folder: Path, tensors: dict[str, tuple[str, list[int]]], config: Any = None) -> Path:
    """Write a safetensors file of zeros and a config.json."""
    table, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = 2 if dtype != "F32" else 4
        for n in shape:
            size *= n
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(at))
    (folder / "config.json").write_text(json.dumps({} if config is None else config))
    return folder


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    write(tmp_path, {"a.weight": ("BF16", [6, 4]), "norm.weight": ("F32", [4])})
    assert shapes_of(tmp_path) == {"a.weight": (6, 4), "norm.weight": (4,)}
    assert parameter_count(tmp_path) == 28
    assert weights_dtype(tmp_path) == "BF16"


def test_a_checkpoint_in_four_bits_is_refused(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    write(tmp_path, {"a": ("F16", [2, 2])}, config)
    with pytest.raises(InputError, match="bitsandbytes") as error:
        refuse_quantized(tmp_path, "the adapter's base")
    assert "--base" in error.value.hint


def test_a_sixteen_bit_checkpoint_passes(tmp_path: Path) -> None:
    refuse_quantized(write(tmp_path, {"a": ("F16", [2, 2])}), "the checkpoint")


def test_an_empty_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tensors"):
        weights_dtype(write(tmp_path, {}))


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        model_config(tmp_path)

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import Make, Patch, edited, edited_json, relative_error

from arte_edge.errors import ArteError, InputError
from arte_edge.gguf.from_base import checkpoint_to_gguf
from arte_edge.gguf.reader import read_model_header

IDS = [1, 17, 42, 3, 88, 5, 60, 61, 9, 33]


# llama.cpp looks GELU, which Gemma has, up in a float16 table.
@pytest.mark.parametrize(("arch", "exact"), [("llama", 1e-5), ("qwen2", 1e-5), ("gemma3", 5e-4)])
def test_llama_cpp_gives_the_logits_of_the_checkpoint(
    arch: str, exact: float, tiny_model: Any, llama_logits: Any, tmp_path: Path
) -> None:
    model = tiny_model(arch)
    expected = model.hf_logits(IDS)
    for dtype, tolerance in (("F32", exact), ("F16", 2e-3)):
        out = checkpoint_to_gguf(model.checkpoint, model.base_gguf, tmp_path / f"{dtype}.gguf", dtype)
        assert relative_error(llama_logits(out, IDS), expected) < tolerance


def test_an_output_matrix_of_its_own_is_written(tiny_model: Any, llama_logits: Any, tmp_path: Path) -> None:
    model, tied = tiny_model("qwen2", tied=False), tiny_model("qwen2")
    out = checkpoint_to_gguf(model.checkpoint, tied.base_gguf, tmp_path / "a.gguf", "F32")
    assert relative_error(llama_logits(out, IDS), model.hf_logits(IDS)) < 1e-5
    # and the other way: the base held the matrix twice, the tied checkpoint holds it once
    out = checkpoint_to_gguf(tied.checkpoint, model.base_gguf, tmp_path / "b.gguf", "F32")
    assert relative_error(llama_logits(out, IDS), tied.hf_logits(IDS)) < 1e-5


def test_a_checkpoint_in_shards_gives_the_same_file(
    tiny_model: Any, make_checkpoint: Make, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    shards = make_checkpoint("llama", num_hidden_layers=2, tie_word_embeddings=True, shard="40KB")
    assert (shards / "model.safetensors.index.json").is_file()
    one = checkpoint_to_gguf(model.checkpoint, model.base_gguf, tmp_path / "one.gguf")
    many = checkpoint_to_gguf(shards, model.base_gguf, tmp_path / "many.gguf")
    assert one.read_bytes() == many.read_bytes()


def test_metadata_is_the_bases_but_for_what_is_no_longer_true(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    out = checkpoint_to_gguf(model.checkpoint, model.base_gguf, tmp_path / "student.gguf")
    base, student = read_model_header(model.base_gguf).fields, read_model_header(out).fields
    assert student["general.file_type"].value == 1  # mostly F16
    changed = {key for key in base.keys() | student.keys() if base.get(key) != student.get(key)}
    assert changed == {"general.file_type", "quantize.imatrix.file"}
    content = out.read_bytes()
    assert str(tmp_path).encode() not in content and b"/home/" not in content


def test_a_full_disk_leaves_nothing(tiny_model: Any, tmp_path: Path, monkeypatch: Patch) -> None:
    model = tiny_model("llama")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArteError, match="disk is full"):
        checkpoint_to_gguf(model.checkpoint, model.base_gguf, tmp_path / "out" / "student.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_weight_that_does_not_fit_is_rejected_by_name(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")

    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6

    big = edited(model.checkpoint, tmp_path / "big", spoil)
    with pytest.raises(ArteError, match=r"blk\.1\.ffn_up\.weight"):
        checkpoint_to_gguf(big, model.base_gguf, tmp_path / "student.gguf")
    assert not (tmp_path / "student.gguf").exists()
    assert checkpoint_to_gguf(big, model.base_gguf, tmp_path / "student.gguf", "BF16").is_file()


def test_a_checkpoint_of_another_base_is_rejected(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    out = tmp_path / "student.gguf"
    with pytest.raises(InputError, match="is qwen2, but"):
        checkpoint_to_gguf(tiny_model("qwen2").checkpoint, model.base_gguf, out)

    def narrow(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:32].clone()

    with pytest.raises(InputError, match=r"model\.norm\.weight is \[32\]"):
        checkpoint_to_gguf(edited(model.checkpoint, tmp_path / "a", narrow), model.base_gguf, out)
    missing = edited(model.checkpoint, tmp_path / "b", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(InputError, match=r"output_norm\.weight"):
        checkpoint_to_gguf(missing, model.base_gguf, out)


def test_an_unknown_family_is_rejected_with_the_supported_ones(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    other = edited_json(model.checkpoint, tmp_path / "other", model_type="mamba")
    with pytest.raises(InputError, match="mamba") as caught:
        checkpoint_to_gguf(other, model.base_gguf, tmp_path / "student.gguf")
    assert all(arch in caught.value.hint for arch in ("llama", "qwen2", "gemma3"))


@pytest.mark.parametrize("damage", ["no folder", "no weights", "bad config"])
def test_a_broken_checkpoint_is_an_input_error(damage: str, tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    broken = tmp_path / "broken"
    if damage != "no folder":
        shutil.copytree(model.checkpoint, broken)
        name = "model.safetensors" if damage == "no weights" else "config.json"
        (broken / name).write_text("{")
    with pytest.raises(InputError, match="broken"):
        checkpoint_to_gguf(broken, model.base_gguf, tmp_path / "student.gguf")

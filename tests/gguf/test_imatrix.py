"""Importance matrices: right sums under the right names; files as llama.cpp reads them."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import Folders, Make, Patch
from tokenizers.pre_tokenizers import ByteLevel

from arte_edge.errors import ArteError, InputError
from arte_edge.gguf import imatrix as room
from arte_edge.gguf.imatrix import Imatrix, collect, linear_names, read_imatrix, write_imatrix
from arte_edge.gguf.names import families

PROMPTS = ["<bos>Is true and false true?", "no", "<bos>maybe the answer is not 42", "yes and no"]
# What a block of each family holds; Phi-3 fuses its projections.
ALPHABET = sorted(ByteLevel.alphabet())
PLAIN = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
FUSED = {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: Folders) -> Make:
    """Make a random two-layer checkpoint of a family, with a tokenizer whose tokens are bytes."""

    @functools.cache
    def make(arch: str = "llama") -> Path:
        inner = tiny.bpe([], ["<pad>", "<bos>", "<eos>"], 259, alphabet=ALPHABET)
        roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
        sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 256}
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
        family = {"gemma3": "gemma3_text"}.get(arch, arch)
        settings = sizes | ids | {"seed": 5, "dtype": "float32", "vary": True}
        return tiny.save_checkpoint(
            tmp_path_factory.mktemp(arch), tiny.chat_tokenizer(inner, **roles), family, **settings
        )

    return make


def ids_of(text: str) -> list[int]:
    bos = text.startswith("<bos>")
    shown = text.removeprefix("<bos>").replace(" ", "Ġ")
    return [1] * bos + [3 + ALPHABET.index(character) for character in shown]


def test_the_first_block_s_sums_are_those_worked_out_by_hand(checkpoint: Make, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = checkpoint("llama")
    weights = load_file(folder / "model.safetensors")
    eps = json.loads((folder / "config.json").read_text())["rms_norm_eps"]
    expected = np.zeros(32)
    for prompt in PROMPTS:
        x = weights["model.embed_tokens.weight"][ids_of(prompt)].astype(np.float64)
        normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps)
        normed *= weights["model.layers.0.input_layernorm.weight"]
        expected += (normed**2).sum(axis=0)
    found = read_imatrix(collect(folder, PROMPTS, tmp_path / "m.gguf"))
    for part in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(found.sums[f"blk.0.{part}.weight"], expected, rtol=1e-5)
    n_token = sum(len(ids_of(prompt)) for prompt in PROMPTS)
    assert found.n_token == n_token


@pytest.mark.parametrize("arch", sorted(families()))
def test_every_matrix_has_its_sums(arch: str, checkpoint: Make, tmp_path: Path, monkeypatch: Patch) -> None:
    # Beside the hooks, watch torch's own product, and tell the matrices apart by their weights.
    import torch

    product = torch.nn.functional.linear
    seen: dict[bytes, NDArray[np.float64]] = {}

    def watched(x: Any, weight: Any, bias: Any = None) -> Any:
        squares = x.double().square().flatten(0, -2).sum(0).numpy()
        mark = weight.detach().numpy().tobytes()
        seen[mark] = seen.get(mark, 0) + squares
        return product(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    found = read_imatrix(collect(checkpoint(arch), PROMPTS, tmp_path / "m.gguf"))
    monkeypatch.undo()
    parts = FUSED if arch == "phi3" else PLAIN
    assert set(found.sums) == {f"blk.{i}.{part}.weight" for i in range(2) for part in parts}
    model = room.load_model(checkpoint(arch), torch.float32)
    for module, name in linear_names(model, checkpoint(arch)).items():
        mark = model.get_submodule(module).weight.detach().numpy().tobytes()
        np.testing.assert_allclose(found.sums[name], seen[mark], rtol=1e-5)


def test_other_prompts_or_models_make_it_again(checkpoint: Make, tmp_path: Path, monkeypatch: Patch) -> None:
    out = collect(checkpoint("llama"), PROMPTS, tmp_path / "m.gguf")
    first = out.read_bytes()
    loads: list[Path] = []
    load = room.load_model
    monkeypatch.setattr(room, "load_model", lambda *given: (loads.append(given[0]), load(*given))[1])
    collect(checkpoint("llama"), PROMPTS, out)
    assert loads == [] and out.read_bytes() == first
    collect(checkpoint("llama"), PROMPTS[:2], out)
    collect(checkpoint("qwen2"), PROMPTS, out)
    assert loads == [checkpoint("llama"), checkpoint("qwen2")]


def test_a_long_prompt_is_run_in_pieces(checkpoint: Make, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(room, "_WINDOW_TOKENS", 8)
    found = read_imatrix(collect(checkpoint("llama"), PROMPTS[:1], tmp_path / "m.gguf"))
    assert found.n_token == len(ids_of(PROMPTS[0]))


def test_what_cannot_be_collected_is_said(checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs prompts"):
        collect(checkpoint("llama"), [], tmp_path / "m.gguf")
    with pytest.raises(InputError, match="no model here"):
        collect(tmp_path, PROMPTS, tmp_path / "m.gguf")


def test_a_diverged_model_is_rejected(checkpoint: Make, tmp_path: Path) -> None:
    def spoil(tensors: Any) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan

    folder = tiny.edited(checkpoint("llama"), tmp_path / "broken", spoil)
    with pytest.raises(ArteError, match=r"blk\.0\.ffn_down.*not finite"):
        collect(folder, PROMPTS, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def example() -> Imatrix:
    sums = {"blk.0.ffn_up.weight": [1.0, 4.0, 9.0], "blk.0.ffn_down.weight": [2.0, 4.0]}
    return Imatrix({name: np.array(row, np.float32) for name, row in sums.items()}, 2, "some prompts", "key")


def test_a_matrix_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = write_imatrix(example(), tmp_path / "m.gguf")
    content, found = path.read_bytes(), read_imatrix(path)
    assert write_imatrix(example(), tmp_path / "b.gguf").read_bytes() == content
    assert (found.dataset, found.key, found.n_token) == ("some prompts", "key", 2)
    weights = {name: values.tolist() for name, values in found.weights().items()}
    assert weights == {"blk.0.ffn_up.weight": [0.5, 2.0, 4.5], "blk.0.ffn_down.weight": [1.0, 2.0]}
    assert all(values.dtype == np.float32 for values in found.weights().values())


def test_the_layout_is_the_one_of_llama_imatrix(tmp_path: Path) -> None:
    # tools/imatrix/imatrix.cpp: general.type first, then these keys; sums and counts in pairs, by name.
    import gguf

    reader = gguf.GGUFReader(write_imatrix(example(), tmp_path / "m.gguf"))
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert keys[:4] == ["general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"]
    assert "general.architecture" not in keys
    for key in ("imatrix.chunk_count", "imatrix.chunk_size"):
        assert reader.fields[key].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["imatrix.datasets"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
    assert [(t.name, t.shape.tolist(), t.tensor_type.name) for t in reader.tensors] == [
        ("blk.0.ffn_down.weight.in_sum2", [2, 1], "F32"),
        ("blk.0.ffn_down.weight.counts", [1, 1], "F32"),
        ("blk.0.ffn_up.weight.in_sum2", [3, 1], "F32"),
        ("blk.0.ffn_up.weight.counts", [1, 1], "F32"),
    ]


def test_another_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "old.dat").write_bytes(b"\x02\x00\x00\x00\x0a\x00\x00\x00blk.0.ffn_")
    with pytest.raises(InputError, match="not a usable GGUF"):
        read_imatrix(tmp_path / "old.dat")


def test_a_value_that_is_not_finite_is_rejected(tmp_path: Path) -> None:
    broken = example()
    broken.sums["blk.0.ffn_up.weight"][1] = 12345.5
    path = write_imatrix(broken, tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(np.float32(12345.5).tobytes(), np.float32(np.inf).tobytes()))
    with pytest.raises(InputError, match="not finite"):
        read_imatrix(path)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_but_never_a_crash(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(write_imatrix(example(), tmp_path / "m.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged.gguf").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = read_imatrix(tmp_path / "damaged.gguf")
    except InputError:
        return
    assert all(np.isfinite(values).all() for values in found.weights().values())

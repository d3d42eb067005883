import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import Patch, write_safetensors

from arte_edge import frozen_weights
from arte_edge.frozen_weights import FilePages, load_frozen, stored_floats
from arte_edge.transformers_load import load_model


def checkpoint(folder: Path, arch: str, dtype: str, tied: bool) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 90}
    return tiny.save_checkpoint(
        folder, None, arch, seed=5, dtype=dtype, vary=True, tie_word_embeddings=tied, **sizes, pad_token_id=0
    )


def held(model: Any) -> int:
    """Return the bytes of the 16-bit weights of a model, one that two layers share once."""
    found = {id(m.held.untyped_storage()): m.held.nbytes for m in model.modules() if hasattr(m, "held")}
    return sum(found.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("qwen2", False), ("gemma3_text", True)])
def test_a_model_in_16_bits_computes_as_the_one_loaded_in_float32(
    arch: str, tied: bool, dtype: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "m", arch, dtype, tied)
    plain, frozen = load_model(folder, torch.float32), load_frozen(folder)
    ids = torch.randint(90, (2, 17))
    assert stored_floats(folder) == dtype and frozen.dtype == torch.float32
    assert torch.equal(plain(ids).logits, frozen(ids).logits)
    assert {m.held.dtype for m in frozen.modules() if hasattr(m, "held")} == {getattr(torch, dtype)}
    assert frozen.get_input_embeddings().weight.dtype == torch.float32  # what asks for it gets a widened copy
    whole = sum(weight.nbytes for weight in plain.parameters())
    left = sum(weight.nbytes for weight in frozen.parameters())
    assert left < 0.1 * whole or arch == "gemma3_text"  # its embedding scales what it looks up, and stays


def test_gradients_pass_through_and_nothing_widened_is_kept_for_them(tmp_path: Path, monkeypatch: Patch) -> None:
    folder = checkpoint(tmp_path / "m", "llama", "bfloat16", False)
    plain, frozen = load_model(folder, torch.float32).requires_grad_(False), load_frozen(folder)
    monkeypatch.setattr(frozen_weights, "_CHUNK", 32 * 25)  # the output layer in four parts
    found, kept = [], list[torch.Tensor]()
    for model in (plain, frozen):
        x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = model(inputs_embeds=x, labels=torch.arange(9)[None]).loss
        loss.backward()
        found.append((loss.detach(), x.grad))
        if model is plain:
            kept.clear()
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    assert not any(t.dtype == torch.float32 and t.shape in {(90, 32), (48, 32), (32, 48)} for t in kept)
    assert sum(t.dtype == torch.bfloat16 for t in kept) == 15  # every layer's weight, as it is stored


def test_a_checkpoint_of_other_floats_is_not_rounded(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "llama", "float32", True)
    assert not stored_floats(folder) and held(load_frozen(folder)) == 0
    mixed = {"a.weight": ("F16", [2, 2]), "norm.weight": ("F32", [2])}
    assert not stored_floats(write_safetensors(tmp_path / "mixed", mixed, model_type="llama"))


def test_a_tied_matrix_is_held_once(tmp_path: Path) -> None:
    sizes = [held(load_frozen(checkpoint(tmp_path / str(tied), "llama", "float16", tied))) for tied in (True, False)]
    assert sizes[1] - sizes[0] == 2 * 90 * 32


def resident_bytes(path: Path) -> int:
    text = Path("/proc/self/smaps").read_text()
    return 1024 * int(re.search(rf"{path}\n(?:.*\n)*?Rss: +(\d+) kB", text)[1])  # type: ignore[index]


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
def test_weights_that_are_not_used_give_their_pages_of_the_file_back(tmp_path: Path) -> None:
    values = {name: torch.randn(1024, 1024) for name in ("one", "both")}
    path = tmp_path / "model.safetensors"
    save_file(values, path)
    mapped = load_file(path)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(1024, 1024, bias=False) for name in ("one", "two", "three")})
    model["one"].weight, model["two"].weight = (torch.nn.Parameter(mapped[name]) for name in ("one", "both"))
    model["three"].weight = model["two"].weight

    def same() -> bool:
        return all(torch.equal(model[name].weight, values[key]) for name, key in (("one", "one"), ("two", "both")))

    assert same()
    size, pages = values["one"].nbytes, FilePages(model)
    before = resident_bytes(path)
    pages.release(model["two"].weight)
    assert resident_bytes(path) == before >= 2 * size, "another layer uses it"
    pages.release(model["one"].weight)
    assert before - resident_bytes(path) >= 0.98 * size
    assert same()
    model["two"].weight.requires_grad_(False)
    pages.release_frozen()
    assert size <= resident_bytes(path) < 1.02 * size, "what is trained stays"
    assert same(), "the file still holds them"

"""Collected importance matrices: the sums are right, under the right names, and survive being killed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import Folders, Patch

from arte_edge.errors import ArteError, InputError
from arte_edge.gguf import imatrix as room
from arte_edge.gguf.imatrix import collect, linear_names, read_imatrix

Make = Callable[[str], Path]
PROMPTS = ["<bos>Is true and false true?", "no", "<bos>maybe the answer is not 42", "yes and no"]
FAMILIES = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma3": "Gemma3TextConfig",
    "smollm3": "SmolLM3Config",
    "phi3": "Phi3Config",
    "granite": "GraniteConfig",
}
# What a block of each family holds; Phi-3 fuses its projections.
PLAIN = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
FUSED = {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: Folders) -> Make:
    """Make a random two-layer checkpoint of a family, with a byte-level tokenizer."""
    made: dict[str, Path] = {}

    def make(arch: str = "llama") -> Path:
        if arch not in made:
            made[arch] = tmp_path_factory.mktemp(arch)
            _save(made[arch], arch)
        return made[arch]

    return make


def _save(folder: Path, arch: str) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    config: Any = getattr(transformers, FAMILIES[arch])(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # fresh norms are all alike: a mix-up would not show
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
    model.save_pretrained(folder)


def ids_of(text: str) -> list[int]:

    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bos = text.startswith("<bos>")
    shown = text.removeprefix("<bos>").replace(" ", "Ġ")
    return [1] * bos + [3 + alphabet.index(character) for character in shown]


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
        np.testing.assert_allclose(found.sums[f"blk.0.{part}.weight"][0], expected, rtol=1e-5)
    n_token = sum(len(ids_of(prompt)) for prompt in PROMPTS)
    assert found.n_token == n_token and all(counts.tolist() == [n_token] for counts in found.counts.values())


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_matrix_has_the_sums_of_what_it_was_multiplied_with(
    arch: str, checkpoint: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
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
    model, _ = room._load(checkpoint(arch))
    for module, name in linear_names(model, checkpoint(arch)).items():
        mark = model.get_submodule(module).weight.detach().numpy().tobytes()
        np.testing.assert_allclose(found.sums[name][0], seen[mark], rtol=1e-5)


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_a_killed_collection_goes_on_and_ends_with_the_same_bytes(
    killed_after: int, checkpoint: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    whole = collect(checkpoint("llama"), PROMPTS, tmp_path / "whole" / "m.gguf")
    out, calls = tmp_path / "killed" / "m.gguf", []
    out.parent.mkdir()
    monkeypatch.setattr(room, "_SAVE_EVERY_S", 0.0)

    def progress(what: str, done: int, total: int) -> None:
        calls.append(done)
        if done == killed_after + 1:
            raise KeyboardInterrupt

    if killed_after < len(PROMPTS):
        with pytest.raises(KeyboardInterrupt):
            collect(checkpoint("llama"), PROMPTS, out, progress=progress)
    assert not out.exists()
    calls.clear()
    collect(checkpoint("llama"), PROMPTS, out, progress=lambda what, done, total: calls.append(done))
    assert calls == list(range(killed_after + 1, len(PROMPTS) + 1))
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["m.gguf"]


def test_a_finished_matrix_is_made_again_only_for_other_prompts_or_another_model(
    checkpoint: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    out = collect(checkpoint("llama"), PROMPTS, tmp_path / "m.gguf")
    first = out.read_bytes()
    loads: list[Path] = []
    load = room._load
    monkeypatch.setattr(room, "_load", lambda folder: (loads.append(folder), load(folder))[1])
    collect(checkpoint("llama"), PROMPTS, out)
    assert loads == [] and out.read_bytes() == first
    collect(checkpoint("llama"), PROMPTS[:2], out)
    collect(checkpoint("qwen2"), PROMPTS, out)
    assert loads == [checkpoint("llama"), checkpoint("qwen2")]


def test_a_damaged_state_is_started_over(checkpoint: Make, tmp_path: Path) -> None:
    whole = collect(checkpoint("llama"), PROMPTS, tmp_path / "whole.gguf")
    (tmp_path / ".m.gguf.state").write_bytes(b"PK\x03\x04 torn")
    assert collect(checkpoint("llama"), PROMPTS, tmp_path / "m.gguf").read_bytes() == whole.read_bytes()


def test_a_long_prompt_is_run_in_pieces_and_counted_whole(
    checkpoint: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(room, "_WINDOW_TOKENS", 8)
    text = PROMPTS[0]
    assert read_imatrix(collect(checkpoint("llama"), [text], tmp_path / "m.gguf")).n_token == len(
        ids_of(text)
    )


def test_no_path_is_told(checkpoint: Make, tmp_path: Path) -> None:
    out = collect(
        checkpoint("llama"), PROMPTS, tmp_path / "m.gguf", dataset="/home/somebody/data/train.jsonl"
    )
    assert read_imatrix(out).datasets == ("train.jsonl",)
    assert b"somebody" not in out.read_bytes() and str(tmp_path).encode() not in out.read_bytes()


def test_what_cannot_be_collected_is_said(checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs prompts"):
        collect(checkpoint("llama"), [], tmp_path / "m.gguf")
    with pytest.raises(InputError, match="cannot be loaded"):
        collect(tmp_path, PROMPTS, tmp_path / "m.gguf")


def test_a_diverged_model_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArteError, match=r"blk\.0\.ffn_down.*not finite"):
        collect(folder, PROMPTS, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()

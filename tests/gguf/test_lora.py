import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Folders, Make

from arte_edge.errors import InputError
from arte_edge.gguf.from_base import adapter_to_gguf, checkpoint_to_gguf
from arte_edge.gguf.reader import read_model_header

IDS = [1, 17, 42, 3, 88, 5, 60, 61, 9, 33]


def relative(got: Any, wanted: Any) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def save_adapter(tiny_model: Any, tmp_path_factory: Folders) -> Make:
    """Save a LoRA with random matrices, both A and B, for a tiny model."""

    def save(arch: str, **settings: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny_model(arch).checkpoint, dtype=torch.float32)
        wanted = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | settings
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **wanted))
        torch.manual_seed(3)
        with torch.no_grad():
            for name, tensor in tuned.named_parameters():
                if "lora_" in name:
                    tensor.copy_(0.15 * torch.randn_like(tensor))
        folder = tmp_path_factory.mktemp("adapter")
        tuned.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize(
    ("arch", "tolerance"), [("llama", 1e-5), ("qwen2", 1e-5), ("gemma3", 5e-4)]
)  # gemma3: llama.cpp looks GELU up in a float16 table
def test_llama_cpp_with_the_adapter_gives_the_logits_of_peft(
    arch: str, tolerance: float, tiny_model: Any, save_adapter: Any, llama_logits: Any, tmp_path: Path
) -> None:
    model, adapter = tiny_model(arch), save_adapter(arch)
    base = checkpoint_to_gguf(model.checkpoint, model.base_gguf, tmp_path / "base.gguf", "F32")
    out = adapter_to_gguf(adapter, base, tmp_path / "adapter.gguf")
    wanted = model.hf_logits(IDS, adapter)
    assert relative(llama_logits(base, IDS, adapter=out), wanted) < tolerance
    assert relative(llama_logits(base, IDS), wanted) > 0.1  # the adapter does change the model


def test_each_pair_of_matrices_may_have_a_rank_of_its_own(
    tiny_model: Any, save_adapter: Any, llama_logits: Any, tmp_path: Path
) -> None:
    model, adapter = tiny_model("llama"), save_adapter("llama", rank_pattern={"q_proj": 2, "down_proj": 8})
    base = checkpoint_to_gguf(model.checkpoint, model.base_gguf, tmp_path / "base.gguf", "F32")
    out = adapter_to_gguf(adapter, base, tmp_path / "adapter.gguf")
    assert relative(llama_logits(base, IDS, adapter=out), model.hf_logits(IDS, adapter)) < 1e-5


def test_the_file_says_what_it_is_and_not_where_it_was_made(
    tiny_model: Any, save_adapter: Any, tmp_path: Path
) -> None:
    base = tiny_model("qwen2").base_gguf
    out = adapter_to_gguf(save_adapter("qwen2", target_modules=["q_proj"]), base, tmp_path / "a.gguf")
    from gguf import GGUFReader

    fields = {key: f.contents() for key, f in GGUFReader(out).fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "qwen2",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 12.0,
    }
    names = [tensor.name for tensor in GGUFReader(out).tensors]
    assert names == [f"blk.{layer}.attn_q.weight.lora_{part}" for layer in (0, 1) for part in "ab"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"] and b"/tmp" not in out.read_bytes()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_what_a_gguf_adapter_cannot_say_is_refused_by_name(
    settings: Any, named: str, tiny_model: Any, save_adapter: Any, tmp_path: Path
) -> None:
    adapter = save_adapter("llama", **settings)
    with pytest.raises(InputError, match=named):
        adapter_to_gguf(adapter, tiny_model("llama").base_gguf, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_an_adapter_of_another_model_is_refused(tiny_model: Any, save_adapter: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "wide"
    shutil.copytree(save_adapter("llama"), adapter)
    wide = {name: t.repeat(2, 2) for name, t in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(wide, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="does not fit"):
        adapter_to_gguf(adapter, tiny_model("llama").base_gguf, tmp_path / "a.gguf")


@pytest.mark.parametrize("damage", ["missing", "cut", "not json"])
def test_a_broken_adapter_is_an_input_error(
    damage: str, tiny_model: Any, save_adapter: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    if damage != "missing":
        shutil.copytree(save_adapter("llama"), broken)
        weights = broken / "adapter_model.safetensors"
        if damage == "cut":
            weights.write_bytes(weights.read_bytes()[:100])
        else:
            (broken / "adapter_config.json").write_text(json.dumps("{")[:2])
    with pytest.raises(InputError, match="broken"):
        adapter_to_gguf(broken, tiny_model("llama").base_gguf, tmp_path / "a.gguf")


def test_an_adapter_is_no_base(tiny_model: Any, save_adapter: Any, tmp_path: Path) -> None:
    adapter = save_adapter("llama")
    out = adapter_to_gguf(adapter, tiny_model("llama").base_gguf, tmp_path / "a.gguf")
    with pytest.raises(InputError):
        read_model_header(out)

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import Folders, Make, edited, relative_error

from arte_edge.checkpoint import write_chat_template
from arte_edge.errors import InputError
from arte_edge.gguf.from_base import adapter_to_gguf, checkpoint_to_gguf
from arte_edge.gguf.reader import read_header, read_model_header
from arte_edge.gguf.tokenizer import template_fields
from arte_edge.gguf.writer import rewrite

IDS = [1, 17, 42, 3, 88, 5, 60, 61, 9, 33]


def test_an_output_matrix_of_its_own_is_written(tiny_model: Any, llama_logits: Any, tmp_path: Path) -> None:
    model, tied = tiny_model("qwen2", tied=False), tiny_model("qwen2")
    out = checkpoint_to_gguf(model.checkpoint, tied.base_gguf, tmp_path / "a.gguf", "F32")
    assert relative_error(llama_logits(out, IDS), model.hf_logits(IDS)) < 1e-5
    # and the other way: the base held the matrix twice, the tied checkpoint holds it once
    out = checkpoint_to_gguf(tied.checkpoint, model.base_gguf, tmp_path / "b.gguf", "F32")
    assert relative_error(llama_logits(out, IDS), tied.hf_logits(IDS)) < 1e-5


def test_metadata_is_the_bases_but_for_what_is_no_longer_true(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    out = checkpoint_to_gguf(model.checkpoint, model.base_gguf, tmp_path / "student.gguf")
    base, student = read_model_header(model.base_gguf).fields, read_model_header(out).fields
    assert student["general.file_type"].value == 1  # mostly F16
    changed = {key for key in base.keys() | student.keys() if base.get(key) != student.get(key)}
    assert changed == {"general.file_type", "quantize.imatrix.file"}
    content = out.read_bytes()
    assert str(tmp_path).encode() not in content and b"/home/" not in content


def test_the_chat_template_is_the_checkpoints_alone(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    checkpoint = Path(shutil.copytree(model.checkpoint, tmp_path / "student"))
    base = Path(shutil.copyfile(model.base_gguf, tmp_path / "base.gguf"))
    rewrite(base, template_fields({"default": "old", "tool_use": "old"}))
    out = checkpoint_to_gguf(checkpoint, base, tmp_path / "a.gguf")
    own = {"tokenizer.chat_template": "{{ messages[0]['content'] }}"}
    assert templates(out) == own
    write_chat_template(checkpoint, "{{ 'new' }}")
    assert templates(checkpoint_to_gguf(checkpoint, base, out)) == {"tokenizer.chat_template": "{{ 'new' }}"}
    (checkpoint / "chat_template.jinja").unlink()
    assert templates(checkpoint_to_gguf(checkpoint, base, out)) == templates(base)  # it has none of its own
    assert len(templates(base)) == 3


def templates(path: Path) -> dict[str, Any]:
    metadata = read_model_header(path).metadata
    return {key: value for key, value in metadata.items() if key.startswith("tokenizer.chat_template")}


def test_a_checkpoint_of_another_base_is_rejected(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    out = tmp_path / "student.gguf"
    with pytest.raises(InputError, match="is qwen2, but"):
        checkpoint_to_gguf(tiny_model("qwen2").checkpoint, model.base_gguf, out)

    def narrow(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:32].clone()

    with pytest.raises(InputError, match=r"output_norm\.weight is \[32\]"):
        checkpoint_to_gguf(edited(model.checkpoint, tmp_path / "a", narrow), model.base_gguf, out)
    missing = edited(model.checkpoint, tmp_path / "b", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(InputError, match=r"output_norm\.weight"):
        checkpoint_to_gguf(missing, model.base_gguf, out)


@pytest.fixture(scope="module")
def save_adapter(tiny_model: Any, tmp_path_factory: Folders) -> Make:
    """Save a LoRA with random matrices, both A and B, for a tiny model."""

    def save(arch: str, **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("adapter")
        wanted = {"lora_alpha": 12, "target_modules": "all-linear"} | settings
        tiny.save_adapter(tiny_model(arch).checkpoint, folder, IDS, **wanted)
        return folder

    return save


RANKS = {"rank_pattern": {"q_proj": 2, "down_proj": 8}}


# gemma3: llama.cpp looks GELU up in a float16 table
@pytest.mark.parametrize(
    ("arch", "lora", "tolerance"),
    [("llama", {}, 1e-5), ("llama", RANKS, 1e-5), ("qwen2", {}, 1e-5), ("gemma3", {}, 5e-4)],
)
def test_llama_cpp_with_the_adapter_gives_the_logits_of_peft(
    arch: str, lora: Any, tolerance: float, tiny_model: Any, save_adapter: Any, llama_logits: Any, tmp_path: Path
) -> None:
    model, adapter = tiny_model(arch), save_adapter(arch, **lora)
    base = checkpoint_to_gguf(model.checkpoint, model.base_gguf, tmp_path / "base.gguf", "F32")
    out = adapter_to_gguf(adapter, base, tmp_path / "adapter.gguf")
    wanted = model.hf_logits(IDS, adapter)
    assert relative_error(llama_logits(base, IDS, adapter=out), wanted) < tolerance
    assert relative_error(llama_logits(base, IDS), wanted) > 0.1  # the adapter does change the model


def test_the_metadata_and_no_private_path(tiny_model: Any, save_adapter: Any, tmp_path: Path) -> None:
    base = tiny_model("qwen2").base_gguf
    out = adapter_to_gguf(save_adapter("qwen2", target_modules=["q_proj"]), base, tmp_path / "a.gguf")
    header = read_header(out)
    kind = {"general.architecture": "qwen2", "general.type": "adapter", "adapter.type": "lora"}
    assert header.metadata == kind | {"adapter.lora.alpha": 12.0}
    assert list(header.tensors) == [f"blk.{layer}.attn_q.weight.lora_{part}" for layer in (0, 1) for part in "ab"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"] and b"/tmp" not in out.read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
    ],
)
def test_a_setting_that_gguf_lacks_is_rejected(
    settings: Any, tiny_model: Any, save_adapter: Any, tmp_path: Path
) -> None:
    named = "embed_tokens" if "target_modules" in settings else next(iter(settings))
    adapter = save_adapter("llama", **settings)
    with pytest.raises(InputError, match=named):
        adapter_to_gguf(adapter, tiny_model("llama").base_gguf, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_an_adapter_of_another_model_is_rejected(tiny_model: Any, save_adapter: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = Path(shutil.copytree(save_adapter("llama"), tmp_path / "wide"))
    wide = {name: t.repeat(2, 2) for name, t in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(wide, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="does not fit"):
        adapter_to_gguf(adapter, tiny_model("llama").base_gguf, tmp_path / "a.gguf")


@pytest.mark.parametrize("damage", ["", "adapter_model.safetensors", "adapter_config.json"])
def test_a_broken_adapter_is_an_error(damage: str, tiny_model: Any, save_adapter: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    if damage:
        shutil.copytree(save_adapter("llama"), broken)
        (broken / damage).write_bytes((broken / damage).read_bytes()[:100])
    with pytest.raises(InputError, match="broken"):
        adapter_to_gguf(broken, tiny_model("llama").base_gguf, tmp_path / "a.gguf")

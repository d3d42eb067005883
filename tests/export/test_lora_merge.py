import shutil
from pathlib import Path

import pytest
from tiny import Patch

from arte_edge.errors import ArteError, InputError
from arte_edge.export.lora_merge import merge, read_adapter

PROMPTS = ["<|im_start|>user\nturn on the light<|im_end|>\n", "is the heating on", "light " * 12]


def test_a_merge_is_checked_by_logits_and_appears_whole(tiny_adapter: Path, tmp_path: Path) -> None:
    adapter = read_adapter(tiny_adapter)
    (tmp_path / ".merged.partial").mkdir()  # left by a killed process
    found = merge(adapter, adapter.base.checkpoint(), tmp_path / "merged", PROMPTS)
    assert found.top1_agreement >= 0.95 and found.tokens > 20
    assert 0 < found.mean_abs_diff < 0.1 * found.update_mean_abs
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (adapter.base.checkpoint() / name).read_bytes()


def test_an_adapter_of_another_model_is_rejected_and_nothing_remains(
    tiny_adapter: Path, tiny_student: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    other = Path(shutil.copytree(tiny_student, tmp_path / "other"))
    config = LlamaConfig.from_pretrained(tiny_student)
    config.hidden_size, config.head_dim = 32, 8
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(other)
    adapter = read_adapter(tiny_adapter, base=str(other))
    with pytest.raises((InputError, ArteError)):
        merge(adapter, other, tmp_path / "merged", PROMPTS)
    assert not (tmp_path / "merged").exists()


def test_a_merge_without_the_adapter_is_caught(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    def forget(base: Path, adapter: Path, out: Path, dtype: str = "auto") -> Path:
        return Path(shutil.copytree(base, out))

    monkeypatch.setattr("arte_edge.distill.train.lora_merge.merge_adapter", forget)
    adapter = read_adapter(tiny_adapter)
    with pytest.raises(ArteError, match="not the same model"):
        merge(adapter, adapter.base.checkpoint(), tmp_path / "merged", PROMPTS)
    assert not (tmp_path / "merged").exists()

from pathlib import Path

import pytest
from tiny import save_checkpoint

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
    from transformers import AutoTokenizer

    other = save_checkpoint(tmp_path / "other", AutoTokenizer.from_pretrained(tiny_student), hidden_size=32)
    adapter = read_adapter(tiny_adapter, base=str(other))
    with pytest.raises((InputError, ArteError)):
        merge(adapter, other, tmp_path / "merged", PROMPTS)
    assert not (tmp_path / "merged").exists()

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import Folders

from arte_edge.distill.train.common import load
from arte_edge.distill.train.lora_merge import check_merge, merge_adapter, sixteen_bits, write_checkpoint
from arte_edge.errors import ArteError

PROMPTS = ["<|user|>Is true and false true?\n", "the answer is not maybe", "no " * 20]


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Any, tmp_path_factory: Folders) -> Path:
    """A LoRA with random matrices, of the size of a short training."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load(tiny_checkpoint(), frozen=False)[0], LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.copy_(0.08 * torch.randn_like(tensor))
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def test_a_merged_checkpoint_is_base_plus_adapter(
    tiny_checkpoint: Any, adapter: Path, tmp_path: Path
) -> None:
    merged = merge_adapter(tiny_checkpoint(), adapter, tmp_path / "merged")
    check = check_merge(tiny_checkpoint(), adapter, merged, PROMPTS)
    assert check.tokens > 30 and check.top1_agreement >= 0.95
    assert 0 < check.mean_abs_diff < 0.02 * check.update_mean_abs


def test_float16_keeps_more_of_the_update_than_bfloat16(
    tiny_checkpoint: Any, adapter: Path, tmp_path: Path
) -> None:
    lost = {}
    for dtype in ("float16", "bfloat16"):
        merged = merge_adapter(tiny_checkpoint(), adapter, tmp_path / dtype, dtype)
        lost[dtype] = check_merge(tiny_checkpoint(), adapter, merged, PROMPTS).mean_abs_diff
    assert lost["bfloat16"] > 4 * lost["float16"]


def test_a_merge_that_forgot_the_adapter_is_an_error(
    tiny_checkpoint: Any, adapter: Path, tmp_path: Path
) -> None:
    base = tiny_checkpoint()
    forgot = write_checkpoint(load(base, frozen=False)[0], base, tmp_path / "forgot")
    with pytest.raises(ArteError, match="not the same model"):
        check_merge(base, adapter, forgot, PROMPTS)


def test_a_merge_with_a_wrong_scale_is_an_error(tiny_checkpoint: Any, adapter: Path, tmp_path: Path) -> None:
    import shutil

    double = tmp_path / "double"
    shutil.copytree(adapter, double)
    config = json.loads((double / "adapter_config.json").read_text())
    (double / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))
    wrong = merge_adapter(tiny_checkpoint(), double, tmp_path / "wrong")
    with pytest.raises(ArteError, match="not the same model"):
        check_merge(tiny_checkpoint(), adapter, wrong, PROMPTS)


def test_weights_that_diverged_or_overflow_are_named(tiny_checkpoint: Any, tmp_path: Path) -> None:
    import torch

    model, _ = load(tiny_checkpoint(), frozen=False)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    with pytest.raises(ArteError, match=r"model\.norm\.weight"):
        write_checkpoint(model, tiny_checkpoint(), tmp_path / "out", "float16")
    model, _ = load(tiny_checkpoint(), frozen=False)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    write_checkpoint(model, tiny_checkpoint(), tmp_path / "out", "bfloat16")


def test_gemma_is_written_as_bfloat16(tiny_checkpoint: Any) -> None:
    assert sixteen_bits(tiny_checkpoint(), "auto") == "float16"
    assert sixteen_bits(tiny_checkpoint(arch="gemma3"), "auto") == "bfloat16"
    assert sixteen_bits(tiny_checkpoint(), "bfloat16") == "bfloat16"

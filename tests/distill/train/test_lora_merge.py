from pathlib import Path
from typing import Any

import pytest
import tiny
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


def test_a_merged_checkpoint_is_base_plus_adapter_and_closer_in_float16_than_in_bfloat16(
    tiny_checkpoint: Any, adapter: Path, tmp_path: Path
) -> None:
    lost = {}
    for dtype in ("auto", "bfloat16"):
        merged = merge_adapter(tiny_checkpoint(), adapter, tmp_path / dtype, dtype)
        check = check_merge(tiny_checkpoint(), adapter, merged, PROMPTS)
        lost[dtype] = check.mean_abs_diff
        assert check.tokens > 30 and check.top1_agreement >= 0.95
    assert 0 < lost["auto"] < 0.02 * check.update_mean_abs
    assert lost["bfloat16"] > 4 * lost["auto"]


@pytest.mark.parametrize("mistake", ["forgot", "double"])
def test_a_merge_without_the_adapter_or_with_a_wrong_scale_is_an_error(
    mistake: str, tiny_checkpoint: Any, adapter: Path, tmp_path: Path
) -> None:
    base = tiny_checkpoint()
    if mistake == "forgot":
        wrong = write_checkpoint(load(base, frozen=False)[0], base, tmp_path / "wrong")
    else:
        double = tiny.edited_json(adapter, tmp_path / "double", "adapter_config.json", lora_alpha=16)
        wrong = merge_adapter(base, double, tmp_path / "wrong")
    with pytest.raises(ArteError, match="not the same model"):
        check_merge(base, adapter, wrong, PROMPTS)


def test_weights_that_diverged_or_overflow_are_named(tiny_checkpoint: Any, tmp_path: Path) -> None:
    import torch

    for dtype in ("bfloat16", "float16"):
        model, _ = load(tiny_checkpoint(), frozen=False)
        with torch.no_grad():
            model.model.norm.weight[0] = 1e6
        if dtype == "bfloat16":
            write_checkpoint(model, tiny_checkpoint(), tmp_path / "out", dtype)
    with pytest.raises(ArteError, match=r"model\.norm\.weight"):
        write_checkpoint(model, tiny_checkpoint(), tmp_path / "out", "float16")


def test_gemma_is_written_as_bfloat16(tiny_checkpoint: Any) -> None:
    assert sixteen_bits(tiny_checkpoint(), "auto") == "float16"
    assert sixteen_bits(tiny_checkpoint(arch="gemma3"), "auto") == "bfloat16"
    assert sixteen_bits(tiny_checkpoint(), "bfloat16") == "bfloat16"

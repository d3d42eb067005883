from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arte_edge.distill.train.completion_head import score_completions_only


def model_with_trls_head(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


@pytest.fixture
def batch() -> dict[str, Any]:
    """Three rows of different lengths, padded; each row's first tokens are its prompt."""
    import torch

    torch.manual_seed(0)
    ids = torch.randint(4, 300, (3, 14))
    lengths, prompts = torch.tensor([14, 9, 12]), torch.tensor([5, 3, 11])
    at = torch.arange(14)
    mask = at < lengths.unsqueeze(1)
    labels = ids.masked_fill(~mask | (at < prompts.unsqueeze(1)), -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_numbers_and_gradients_are_those_of_trls_own_head(
    arch: str, tiny_checkpoint: Any, batch: dict[str, Any]
) -> None:
    import torch

    results = []
    for ours in (False, True):
        model = model_with_trls_head(tiny_checkpoint(arch=arch))
        assert not ours or score_completions_only(model)
        out = model(**batch, fused_lm_head=True)
        (out.log_probs.sum() / 7).backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters()}))
    (theirs, their_grads), (mine, my_grads) = results
    for field in ("loss", "log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(mine, field), getattr(theirs, field), rtol=1e-4, atol=1e-5)
    for field in ("is_top1", "label_mask"):
        assert torch.equal(getattr(mine, field), getattr(theirs, field))
    for name, grad in their_grads.items():
        torch.testing.assert_close(my_grads[name], grad, rtol=1e-3, atol=1e-5)


def test_without_trls_flag_the_model_gives_its_logits(tiny_checkpoint: Any, batch: dict[str, Any]) -> None:
    model = model_with_trls_head(tiny_checkpoint())
    score_completions_only(model)
    assert model(input_ids=batch["input_ids"]).logits.shape == (3, 14, model.config.vocab_size)


def test_a_family_whose_logits_are_scaled_is_left_alone(tiny_checkpoint: Any) -> None:
    model = model_with_trls_head(tiny_checkpoint())
    model.config.model_type = "granite"
    before = model.forward
    assert not score_completions_only(model)
    assert model.forward == before

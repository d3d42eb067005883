from pathlib import Path
from typing import Any

import pytest
from tiny import Patch

from arte_edge.distill.train.completion_head import attends_fully, score_completions_only


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


def trls_batch() -> dict[str, Any]:
    """Return three pairs as TRL's own collator lays them out: lengths differ in every part."""
    import torch
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    torch.manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(4, 300, (n,)).tolist()

    pairs = [
        {"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)}
        for p, c, r in ((7, 5, 2), (3, 1, 9), (12, 4, 4))
    ]
    batch = DataCollatorForPreference(pad_token_id=0)(pairs)
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    return {**batch, "labels": labels}


def log_probs_and_gradients(checkpoint: Path, pairs: bool | None) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    add_fused_lm_head(model)
    if pairs is not None:
        assert score_completions_only(model, pairs=pairs)
    out = model(**trls_batch(), fused_lm_head=True, use_cache=False)
    sign = torch.tensor([1.0, 1, 1, -1, -1, -1]).unsqueeze(1)  # chosen up, rejected down
    (out.log_probs * sign).sum().backward()
    return out.log_probs, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_a_prompt_computed_once_gives_the_same_numbers_and_gradients(arch: str, tiny_checkpoint: Any) -> None:
    import torch

    theirs, their_grads = log_probs_and_gradients(tiny_checkpoint(arch=arch), None)
    mine, my_grads = log_probs_and_gradients(tiny_checkpoint(arch=arch), True)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for name, grad in their_grads.items():
        torch.testing.assert_close(my_grads[name], grad, rtol=1e-3, atol=1e-4)


def test_fewer_tokens_are_computed_where_attention_is_full(tiny_checkpoint: Any, monkeypatch: Patch) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    seen: list[int] = []
    forward = LlamaModel.forward

    def counting(self: Any, input_ids: Any, **kwargs: Any) -> Any:
        seen.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counting)
    log_probs_and_gradients(tiny_checkpoint(), False)
    log_probs_and_gradients(tiny_checkpoint(), True)
    apart, shared = seen
    assert apart == 6 * 16 and shared == 3 * 20


def test_a_sliding_window_is_not_one_mask(tiny_checkpoint: Any) -> None:
    from transformers import AutoModelForCausalLM

    full, sliding = (
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint(arch=a)) for a in ("qwen2", "gemma3")
    )
    assert attends_fully(full.config) and not attends_fully(sliding.config)

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Patch

from arte_edge.distill.train import completion_head
from arte_edge.distill.train.completion_head import attends_fully, score_completions_only

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def single_rows() -> dict[str, Any]:
    """Return three rows of different lengths, padded; each row's first tokens are its prompt."""
    import torch

    torch.manual_seed(0)
    ids = torch.randint(4, 300, (3, 14))
    lengths, prompts = torch.tensor([14, 9, 12]), torch.tensor([5, 3, 11])
    at = torch.arange(14)
    mask = at < lengths.unsqueeze(1)
    labels = ids.masked_fill(~mask | (at < prompts.unsqueeze(1)), -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def rows_that_begin_alike() -> dict[str, Any]:
    """Return three rows whose first ten tokens are the same, and part of every prompt."""
    import torch

    torch.manual_seed(0)
    ids = torch.randint(4, 300, (3, 24))
    ids[:, :10] = ids[0, :10]
    at, lengths, prompts = torch.arange(24), torch.tensor([24, 15, 20]), torch.tensor([18, 12, 11])
    mask = at < lengths.unsqueeze(1)
    labels = ids.masked_fill(~mask | (at < prompts.unsqueeze(1)), -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels, "use_cache": False}


def pair_rows() -> dict[str, Any]:
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
    return {**batch, "labels": labels, "use_cache": False}


def with_trls_head(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model


def outputs_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    out = model(**batch, fused_lm_head=True)
    n = len(out.log_probs)
    # Chosen up, rejected down.
    signs = out.log_probs.new_tensor([[1.0] if i < (n + 1) // 2 else [-1.0] for i in range(n)])
    (out.log_probs * signs).sum().backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("rows", [single_rows, rows_that_begin_alike, pair_rows])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_numbers_and_gradients_are_those_of_trls_own_head(
    arch: str, rows: Callable[[], dict[str, Any]], tiny_checkpoint: Any
) -> None:
    import torch

    batch, pairs, model = rows(), rows is pair_rows, with_trls_head(tiny_checkpoint(arch=arch))
    theirs, their_grads = outputs_and_gradients(model, batch)
    model = with_trls_head(tiny_checkpoint(arch=arch))
    assert score_completions_only(model, pairs=pairs)
    mine, my_grads = outputs_and_gradients(model, batch)
    for field in ("loss", *OUTPUTS[:3]):
        torch.testing.assert_close(getattr(mine, field), getattr(theirs, field), rtol=1e-4, atol=1e-5)
    for field in ("is_top1", "label_mask"):
        assert torch.equal(getattr(mine, field), getattr(theirs, field))
    for name, grad in their_grads.items():
        torch.testing.assert_close(my_grads[name], grad, rtol=1e-3, atol=1e-4)


def test_a_rounded_head_gives_the_log_probabilities_and_gradients_of_a_wide_one() -> None:
    import torch

    torch.manual_seed(0)
    hidden = (4 * torch.randn(150, 48)).bfloat16()
    weight, targets = torch.randn(3000, 48).bfloat16(), torch.randint(0, 3000, (150,))
    targets[::2] = (hidden @ weight.T).argmax(-1)[::2]  # as in a text that the model may well write
    grad = torch.randn(150)

    def of(score: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        start = hidden.clone().requires_grad_()
        found = score(start)
        found.backward(grad)
        assert start.grad is not None
        return found.detach(), start.grad.float()

    wide = of(lambda h: (h.float() @ weight.T.float()).log_softmax(-1).gather(1, targets[:, None])[:, 0])
    rounded = of(lambda h: completion_head._rounded_log_probs()(h, weight, targets)[0])
    plain = of(lambda h: (h @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(rounded[0], wide[0], rtol=1e-4, atol=1e-3)
    assert (plain[0] - wide[0]).abs().max() > 0.05, "rounding does harm here"
    assert torch.cosine_similarity(rounded[1].flatten(), wide[1].flatten(), 0) > 0.9999


def test_a_frozen_head_is_rounded_where_the_processor_multiplies_bfloat16(
    tiny_checkpoint: Any, monkeypatch: Patch
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    def scored(targets: list[str], able: bool) -> tuple[bool, Any]:
        torch.manual_seed(0)
        monkeypatch.setattr(completion_head, "multiplies_bfloat16", lambda: able)
        plain = with_trls_head(tiny_checkpoint(arch="qwen2")).to(torch.bfloat16)
        model = get_peft_model(plain, LoraConfig(target_modules=targets, init_lora_weights=False))
        base = model.get_base_model()
        replaced = score_completions_only(base, pairs=True)
        return replaced, outputs_and_gradients(base, pair_rows()) if replaced else None

    asked: list[int] = []
    rounded = completion_head._rounded_log_probs()
    monkeypatch.setattr(completion_head, "_rounded_log_probs", lambda: lambda *a: (asked.append(1), rounded(*a))[1])
    (_, (wide, wide_grads)) = scored(["q_proj"], able=False)
    assert not asked
    (_, (mine, my_grads)) = scored(["q_proj"], able=True)
    assert asked
    torch.testing.assert_close(mine.log_probs, wide.log_probs, rtol=1e-3, atol=1e-3)
    for name, grad in wide_grads.items():
        if grad is not None:
            torch.testing.assert_close(my_grads[name], grad, rtol=0.1, atol=0.02 * float(grad.abs().max()))
    assert scored(["q_proj", "lm_head"], able=True) == (False, None), "the head's adapter counts"


def test_without_trls_flag_the_model_gives_its_logits(tiny_checkpoint: Any) -> None:
    model = with_trls_head(tiny_checkpoint())
    score_completions_only(model)
    logits = model(input_ids=single_rows()["input_ids"]).logits
    assert logits.shape == (3, 14, model.config.vocab_size)


def test_a_family_whose_logits_are_scaled_is_left_alone(tiny_checkpoint: Any) -> None:
    model = with_trls_head(tiny_checkpoint())
    model.config.model_type = "granite"
    before = model.forward
    assert not score_completions_only(model)
    assert model.forward == before


def test_fewer_tokens_are_computed_where_attention_is_full(tiny_checkpoint: Any, monkeypatch: Patch) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    seen: list[int] = []
    forward = LlamaModel.forward

    def counting(self: Any, input_ids: Any, **kwargs: Any) -> Any:
        seen.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counting)
    for rows in (single_rows, rows_that_begin_alike, pair_rows):
        model = with_trls_head(tiny_checkpoint())
        score_completions_only(model, pairs=rows is pair_rows)
        outputs_and_gradients(model, rows())
    assert seen == [3 * 14, 10 + 14 + 5 + 10, 3 * 20]  # a common beginning is computed once
    kinds = [with_trls_head(tiny_checkpoint(arch=arch)).config for arch in ("qwen2", "gemma3")]
    assert [attends_fully(config) for config in kinds] == [True, False]  # a sliding window is not one mask

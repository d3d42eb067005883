"""On a CPU, score the completion tokens alone, with the ordinary output layer.

TRL computes log-probabilities in tiles that suit a GPU's memory. Without a GPU it
scores every prompt token as well, whose result is thrown away, and computes each
tile twice. With 49,000 to 262,000 words in a vocabulary that is a quarter to a half
of the whole training time. This gives TRL the same numbers by the plain way.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["score_completions_only"]

# Families whose logits are the output layer's, neither scaled nor capped.
_PLAIN_HEADS = ("llama", "qwen2", "gemma3_text")


def score_completions_only(model: Any) -> bool:
    """Replace the forward pass that TRL gave `model` (not its PEFT wrapper); return whether it was.

    It is left alone on a GPU, for other families, and for a TRL that works in another way.
    """
    from trl.trainer import utils

    known = hasattr(utils, "FusedCausalLMOutput") and model.config.model_type in _PLAIN_HEADS
    if not known or model.device.type != "cpu":
        return False
    theirs = model.forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return theirs(*args, labels=labels, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        return utils.FusedCausalLMOutput(**_scores(self.get_output_embeddings(), hidden, labels[:, 1:]))

    model.forward = MethodType(forward, model)
    return True


def _scores(head: Any, hidden: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return TRL's per-token fields ``[n_row, n_token]``, zero where the label is -100.

    `hidden` is ``[n_row, n_token, n_dim]``; `labels` are the next tokens.
    """
    import torch

    mask = labels != -100
    targets = labels[mask]
    logits = head(hidden[mask]).float()  # [n_label, n_vocab]
    log_total = logits.logsumexp(-1)
    log_probs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_total
    with torch.no_grad():
        entropy = log_total - (torch.exp(logits - log_total.unsqueeze(-1)) * logits).sum(-1)
        mean_logits, is_top1 = logits.mean(-1), logits.argmax(-1) == targets

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    return {
        "loss": -log_probs.sum() / mask.sum().clamp(min=1),
        "log_probs": spread(log_probs),
        "entropy": spread(entropy),
        "mean_logits": spread(mean_logits),
        "is_top1": spread(is_top1),
        "label_mask": mask,
    }

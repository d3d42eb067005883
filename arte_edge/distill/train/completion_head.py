"""On a CPU, score the completion tokens alone, with the ordinary output layer.

TRL computes log-probabilities in tiles that suit a GPU's memory. Without a GPU it
scores every prompt token as well, whose result is thrown away, and computes each
tile twice. With 49,000 to 262,000 words in a vocabulary that is a quarter to a half
of the whole training time. This gives TRL the same numbers by the plain way.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from arte_edge.distill.train.shared_prompt import attends_fully, pair_hidden_states
from arte_edge.private_names import missing

if TYPE_CHECKING:
    import torch

__all__ = ["score_completions_only"]

# Families whose logits are the output layer's, neither scaled nor capped.
_PLAIN_HEADS = ("llama", "qwen2", "gemma3_text")


def score_completions_only(model: Any, *, pairs: bool = False) -> bool:
    """Replace the forward pass that TRL gave `model` (not its PEFT wrapper); return whether it was.

    `pairs`: batches are preference pairs, whose prompt is then computed once. The model is
    left alone on a GPU, for other families, and for a TRL that works in another way.
    """
    if missing(__name__) or model.config.model_type not in _PLAIN_HEADS or model.device.type != "cpu":
        return False
    from trl.trainer import utils

    theirs, shared = model.forward, pairs and attends_fully(model.config)

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return theirs(*args, labels=labels, **kwargs)
        mask = labels[:, 1:] != -100
        if shared:
            ids, attention = kwargs["input_ids"], kwargs["attention_mask"]
            hidden = pair_hidden_states(self.base_model, ids, attention, labels)
        else:
            hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1][mask]
        scores = _scores(self.get_output_embeddings(), hidden, labels[:, 1:][mask])
        spread = {name: _spread(values, mask) for name, values in scores.items()}
        loss = -spread["log_probs"].sum() / mask.sum().clamp(min=1)
        return utils.FusedCausalLMOutput(loss=loss, label_mask=mask, **spread)

    model.forward = MethodType(forward, model)
    return True


def _scores(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return TRL's per-token fields ``[n_label]`` for `hidden` ``[n_label, n_dim]``."""
    import torch

    logits = head(hidden).float()  # [n_label, n_vocab]
    log_total = logits.logsumexp(-1)
    log_probs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_total
    with torch.no_grad():
        entropy = log_total - (torch.exp(logits - log_total.unsqueeze(-1)) * logits).sum(-1)
        mean_logits, is_top1 = logits.mean(-1), logits.argmax(-1) == targets
    return {"log_probs": log_probs, "entropy": entropy, "mean_logits": mean_logits, "is_top1": is_top1}


def _spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return `values` ``[n_label]`` at the places of `mask` ``[n_row, n_token]``, zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)

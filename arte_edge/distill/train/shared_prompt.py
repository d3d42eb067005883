"""The two completions of a preference pair share their prompt: run it through the model once.

    row of TRL's batch     prompt chosen   |   prompt rejected
    what is computed       prompt chosen rejected

The rejected completion's positions go on from the prompt, and it does not attend to
the chosen one, so every number is the same. Where a prompt is longer than an answer,
as it is when a teacher is asked for questions, that is up to half of the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arte_edge.private_names import missing

if TYPE_CHECKING:
    import torch

__all__ = ["attends_fully", "pair_hidden_states"]


def attends_fully(config: Any) -> bool:
    """Return whether every layer attends to all earlier tokens, which one mask can then restrict."""
    if missing(__name__):
        return False
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return set(kinds) == {"full_attention"} and config._attn_implementation == "sdpa"


def pair_hidden_states(
    backbone: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the hidden states ``[n_label, n_dim]`` from which the labelled tokens are predicted, row by row.

    All three are ``[2 * n_pair, n_token]``, padded on the right, chosen rows first as TRL lays
    them out. `labels` are -100 but in completions.
    """
    import torch

    n_pair = input_ids.shape[0] // 2
    lengths = attention_mask.sum(1).tolist()
    prompts = (labels != -100).int().argmax(1).tolist()
    packs = [_Pack(prompts[i], lengths[i], lengths[i + n_pair]) for i in range(n_pair)]
    width = max(pack.length for pack in packs)
    ids = input_ids.new_zeros(n_pair, width)
    positions = torch.zeros_like(ids)
    mask = torch.eye(width, dtype=torch.bool, device=ids.device).repeat(n_pair, 1, 1)  # padding sees itself
    for i, pack in enumerate(packs):
        rejected = input_ids[i + n_pair, pack.prompt : lengths[i + n_pair]]
        ids[i, : pack.length] = torch.cat([input_ids[i, : pack.chosen_end], rejected])
        positions[i, : pack.length] = pack.positions(ids.device)
        mask[i, : pack.length, : pack.length] = pack.mask(ids.device)
    additive = torch.zeros(mask.shape, dtype=backbone.dtype, device=ids.device)
    additive.masked_fill_(~mask, torch.finfo(backbone.dtype).min)
    hidden = backbone(
        input_ids=ids, attention_mask=additive.unsqueeze(1), position_ids=positions, use_cache=False
    ).last_hidden_state
    chosen = [hidden[i, pack.prompt - 1 : pack.chosen_end - 1] for i, pack in enumerate(packs)]
    rejected_parts = [hidden[i, pack.rejected_sources(ids.device)] for i, pack in enumerate(packs)]
    return torch.cat(chosen + rejected_parts)


class _Pack:
    """Where prompt, chosen and rejected lie in one packed row."""

    def __init__(self, prompt: int, chosen_end: int, rejected_end: int) -> None:
        self.prompt, self.chosen_end = prompt, chosen_end
        self.n_rejected = rejected_end - prompt
        self.length = chosen_end + self.n_rejected

    def positions(self, device: torch.device) -> torch.Tensor:
        import torch

        first = torch.arange(self.chosen_end, device=device)
        return torch.cat([first, torch.arange(self.n_rejected, device=device) + self.prompt])

    def mask(self, device: torch.device) -> torch.Tensor:
        """Return ``[length, length]``: may the token of a row see that of a column?"""
        import torch

        seen = torch.ones(self.length, self.length, dtype=torch.bool, device=device).tril()
        seen[self.chosen_end :, self.prompt : self.chosen_end] = False
        return seen

    def rejected_sources(self, device: torch.device) -> torch.Tensor:
        """Return the packed positions that predict the rejected tokens: the prompt's end, then their own."""
        import torch

        own = torch.arange(self.chosen_end, self.length - 1, device=device)
        return torch.cat([torch.tensor([self.prompt - 1], device=device), own])

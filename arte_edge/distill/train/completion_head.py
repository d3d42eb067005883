"""On a CPU, compute the completion tokens only, with the ordinary output layer, and each pair's prompt once.

TRL computes log-probabilities in tiles that suit a GPU's memory. Without a GPU it scores every prompt token as well,
whose result is discarded, and computes each tile twice: a quarter to a half of the whole training time. This gives
TRL the same numbers directly. The two completions of a preference pair share their prompt and are computed in one row,
``prompt chosen rejected``: the rejected one's positions continue from the prompt, and it does not attend to the chosen.
The rows of a supervised batch all begin with the task's instruction, and are computed in one row as well,
``beginning rest rest …``, each rest attending to the beginning and to itself.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

from arte_edge.distill.train.ranks import is_sharded
from arte_edge.private_apis import missing
from arte_edge.runtimes.transformers.placement import multiplies_bfloat16

if TYPE_CHECKING:
    import torch

_EXACT = 64  # logits of a token that are computed in float32
_AT_ONCE = 64  # tokens whose rows of the output layer are gathered at a time
_ROWS = 8  # tokens whose entropies are computed at a time
_FEWEST_SHARED = 8  # tokens; a shorter beginning is not worth the longer row

# Families whose logits are the output layer's, neither scaled nor capped.
_PLAIN_HEADS = ("llama", "qwen2", "gemma3_text")


def score_completions_only(model: Any, *, pairs: bool = False) -> bool:
    """Replace the forward pass that TRL gave `model` (not its PEFT wrapper); return whether it was.

    `pairs`: batches are preference pairs, whose prompt is then computed once. The model is
    left alone on a GPU, for other families, and for a TRL that works in another way.
    """
    if not _is_plain(model):
        return False
    from trl.trainer import utils

    theirs, shared = model.forward, attends_fully(model.config)

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return theirs(*args, labels=labels, **kwargs)
        mask = labels[:, 1:] != -100
        ids, attention = kwargs["input_ids"], kwargs["attention_mask"]
        if shared and pairs:
            hidden = pair_hidden_states(self.base_model, ids, attention, labels)
        elif shared and not pairs and (n := _n_shared(ids, labels)):
            hidden = shared_hidden_states(self.base_model, ids, attention, labels, n)
        else:
            hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1][mask]
        scores = _scores(self.get_output_embeddings(), hidden, labels[:, 1:][mask])
        spread = {name: _spread(values, mask) for name, values in scores.items()}
        loss = -spread["log_probs"].sum() / mask.sum().clamp(min=1)
        return utils.FusedCausalLMOutput(loss=loss, label_mask=mask, **spread)

    model.forward = MethodType(forward, model)
    return True


def _is_plain(model: Any) -> bool:
    if is_sharded():  # the backbone alone would compute with a part of the weights
        return False
    import torch

    head = model.get_output_embeddings()  # with an adapter of its own it is of another class
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    return not missing(__name__) and model.config.model_type in _PLAIN_HEADS and model.device.type == "cpu"


def packs_pairs(model: Any) -> bool:
    """Return whether `pair_hidden_states` and the output layer give the logits of `model`, not its PEFT wrapper."""
    return _is_plain(model) and attends_fully(model.config)


def output_logits(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits ``[n_label, n_vocab]`` of a plain output layer in float32, whatever floats its weights have.

    bfloat16 rounds a logit of 16 to the next 1/8: more than an alignment moves it at first.
    """
    import torch

    if hidden.dtype == torch.float32:
        return head(hidden)  # type: ignore[no-any-return]
    return torch.nn.functional.linear(hidden.float(), head.weight.float())


def _scores(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return TRL's per-token fields ``[n_label]`` for `hidden` ``[n_label, n_dim]``."""
    import torch

    if hidden.dtype == torch.bfloat16 and not head.weight.requires_grad and multiplies_bfloat16():
        log_probs, logits, log_total = _rounded_log_probs()(hidden, head.weight, targets)
    else:
        logits = output_logits(head, hidden)  # [n_label, n_vocab]
        log_total = logits.logsumexp(-1)
        log_probs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_total
    with torch.no_grad():
        # Some rows at a time: fresh memory for copies of all logits takes longer than their exponentials.
        parts = zip(logits.split(_ROWS), log_total.split(_ROWS), strict=True)
        entropy = torch.cat([total - (torch.exp(row - total.unsqueeze(-1)) * row).sum(-1) for row, total in parts])
        mean_logits, is_top1 = logits.mean(-1), logits.argmax(-1) == targets
    return {"log_probs": log_probs, "entropy": entropy, "mean_logits": mean_logits, "is_top1": is_top1}


@cache
def _rounded_log_probs() -> Any:
    """Return a function of hidden states, frozen output weights and targets: their log-probabilities, logits, log-sums.

    A product in bfloat16 takes a sixth of the time of one in float32, but rounds a logit of 16 to the next 1/8. So the
    target's logit and the `_EXACT` largest ones, which carry the sum, are computed again in float32: log-probabilities
    are then within 0.001. Logits and their log-sums have no gradient: only metrics are made of them. Torch is imported
    late.
    """
    import torch

    class RoundedLogProbs(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = torch.nn.functional.linear(hidden, weight)
            largest = logits.topk(min(_EXACT, len(weight)), -1).indices  # [n_label, n]
            wide = hidden.float()
            parts = zip(torch.split(wide, _AT_ONCE), torch.split(largest, _AT_ONCE), strict=True)
            exact = torch.cat([torch.einsum("ld,lnd->ln", rows, weight[at].float()) for rows, at in parts])
            logits = logits.float().scatter_(1, largest, exact)
            of_targets = (wide * weight[targets].float()).sum(-1)
            log_total = logits.logsumexp(-1)
            ctx.save_for_backward(logits, log_total, weight, targets)
            ctx.mark_non_differentiable(logits, log_total)
            return of_targets - log_total, logits, log_total

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
            logits, log_total, weight, targets = ctx.saved_tensors
            share = torch.exp(logits - log_total.unsqueeze(-1))
            share.scatter_add_(1, targets.unsqueeze(1), -torch.ones_like(log_total).unsqueeze(1))
            of_hidden = share.mul_(-grad.unsqueeze(1)).to(weight.dtype) @ weight
            return of_hidden, None, None

    return RoundedLogProbs.apply


def _spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return `values` ``[n_label]`` at the places of `mask` ``[n_row, n_token]``, zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


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


def _n_shared(input_ids: torch.Tensor, labels: torch.Tensor) -> int:
    """Return the tokens with which all rows begin, before any label; 0 if they are too few to be worth it."""
    first_label = int((labels != -100).int().argmax(1).min())
    same = (input_ids[:, : max(first_label - 1, 0)] == input_ids[:1, : max(first_label - 1, 0)]).all(0)
    n = int(same.int().cumprod(0).sum())
    return n if n >= _FEWEST_SHARED and len(input_ids) > 1 else 0


def shared_hidden_states(
    backbone: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, n_shared: int
) -> torch.Tensor:
    """Return the hidden states ``[n_label, n_dim]`` from which the labelled tokens are predicted, row by row.

    The three are ``[n_row, n_token]``, padded on the right; all rows begin with the same `n_shared` tokens. `labels`
    are -100 but in completions.
    """
    import torch

    lengths, device = attention_mask.sum(1).tolist(), input_ids.device
    rests = [input_ids[i, n_shared:length] for i, length in enumerate(lengths)]
    starts = [n_shared]  # of each rest in the packed row
    for rest in rests:
        starts.append(starts[-1] + len(rest))
    positions = [torch.arange(n_shared, n_shared + len(rest), device=device) for rest in rests]
    seen = torch.ones(starts[-1], starts[-1], dtype=torch.bool, device=device).tril()
    for start in starts[1:-1]:
        seen[start:, n_shared:start] = False
    additive = torch.zeros(seen.shape, dtype=backbone.dtype, device=device)
    additive.masked_fill_(~seen, torch.finfo(backbone.dtype).min)
    hidden: torch.Tensor = backbone(
        input_ids=torch.cat([input_ids[0, :n_shared], *rests]).unsqueeze(0),
        attention_mask=additive[None, None],
        position_ids=torch.cat([torch.arange(n_shared, device=device), *positions]).unsqueeze(0),
        use_cache=False,
    ).last_hidden_state[0]
    row, token = (labels[:, 1:] != -100).nonzero(as_tuple=True)  # the position before each label, row by row
    return hidden[torch.tensor(starts, device=device)[row] + token - n_shared]


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

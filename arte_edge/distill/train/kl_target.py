"""Size the steps of an alignment by what they do: a learning rate that reaches a given KL divergence.

A rate says little about how far it moves a model: 1e-7 on all weights, 5e-6 on a LoRA adapter, on three steps or on
three hundred. So the divergence from the original teacher is measured after every step, on completions of held-out
prompts, and sets the rate of the next one. To second order KL grows with the square of the distance travelled, which
under Adam is about the sum of the rates so far: that predicts the sum which reaches the target, and the rest of it is
spread over the steps that are left, falling linearly. The first rates rise by `_GROWTH` until there is something to
measure. Training ends in the band just below the target; a step beyond it is scaled back into it, so that no adapter
that is checked or used is further away. What was measured is stored after every step: a resumed training measures
nothing twice and goes on with the same rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arte_edge.distill.train.checkpoints import Workspace
from arte_edge.distill.train.completion_head import output_logits, packs_pairs, pair_hidden_states
from arte_edge.distill.train.ranks import agreed, is_main
from arte_edge.store import read_jsonl, write_jsonl

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback

FEWEST_STEPS = 8  # the rise takes about three, and the rest corrects what they predict
_GROWTH = 3.0  # of the rate from one step to the next, at most
_BAND = 0.85  # share of the target from which it counts as reached
_TRIES = 6  # to scale a step back into the band
_WATCHED_TOKENS = 64  # first tokens of a completion that are measured after a step

Pair = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids


@dataclass(frozen=True)
class HeldOut:
    """How an aligned teacher differs from the original one on held-out pairs."""

    kl: float  # nats a token, from the original to the aligned one, on the watched pairs
    pairs: int
    right: int  # pairs whose chosen text gained more log-probability than the rejected one
    margin: float  # mean difference of the two gains in nats, times beta: DPO's reward margin


def next_rate(done: Sequence[tuple[float, float]], left: int, first: float, target: float) -> float:
    """Return the rate of the next step.

    Args:
        done: rate and KL after it of each step so far.
        left: steps that are left, at least 1.
        first: rate of the first step.
        target: KL in nats a token at which to arrive.
    """
    if not done:
        return first
    last, kl = done[-1]
    if kl <= 0:
        return last * _GROWTH
    travelled = sum(rate for rate, _ in done)
    wanted = travelled * (math.sqrt(target / kl) - 1)
    return min(max(2 * wanted / (left + 1), 0.0), last * _GROWTH)


class StepSizer:
    """Measures after each step, sets the rate of the next, and ends the training at the target."""

    def __init__(self, workspace: Workspace, pairs: Sequence[Pair], first_rate: float, target: float) -> None:
        self._file, self._first, self._target = workspace.folder / "kl.jsonl", first_rate, target
        rows = read_jsonl(self._file) if self._file.is_file() else []
        self.rows: list[dict[str, Any]] = [row for row in rows if {"step", "rate", "kl"} <= row.keys()]
        self._watched = [
            pair | {side: pair[side][:_WATCHED_TOKENS] for side in ("chosen_ids", "rejected_ids")} for pair in pairs
        ]
        self._original: list[torch.Tensor] = []

    def forget_after(self, step: int) -> None:
        """Drop the measurements of steps that a resumed training repeats."""
        self.rows = [row for row in self.rows if row["step"] <= step]

    @property
    def reached(self) -> bool:
        """Whether the target is reached."""
        return bool(self.rows) and self.rows[-1]["kl"] >= _BAND * self._target > 0

    def rates(self) -> dict[int, dict[str, Any]]:
        """Return rate and KL by step."""
        return {row["step"]: row for row in self.rows}

    def kl(self, model: Any) -> float:
        """Return the mean KL in nats a token from `model` without its adapter to `model`, on the watched pairs."""
        if not self._original:
            with model.disable_adapter():
                self._original = [_log_probs(model, pair) for pair in self._watched]
        total = n = 0.0
        for pair, before in zip(self._watched, self._original, strict=True):
            after = _log_probs(model, pair)
            total += float((before.exp() * (before - after)).sum())
            n += len(before)
        return total / n

    def callback(self) -> TrainerCallback:
        """Return the callback that steers the training; nothing is done where there is no target."""
        from transformers import TrainerCallback

        sizer = self

        class Steering(TrainerCallback):  # type: ignore[misc]
            def on_pre_optimizer_step(
                self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
            ) -> None:
                done = [(row["rate"], row["kl"]) for row in sizer.rows]
                left = state.max_steps - state.global_step
                for group in optimizer.param_groups:
                    group["lr"] = next_rate(done, left, sizer._first, sizer._target)

            def on_step_end(
                self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
            ) -> None:
                done = [(row["rate"], row["kl"]) for row in sizer.rows]
                left = state.max_steps - state.global_step + 1
                rate = next_rate(done, left, sizer._first, sizer._target)
                kl, scale = sizer._scaled_back(model)
                sizer.rows.append({"step": state.global_step, "rate": rate, "kl": kl, "scale": scale})
                if is_main():
                    write_jsonl(sizer._file, sizer.rows)
                if sizer.reached:
                    control.should_training_stop = control.should_save = True

        return Steering()

    def _scaled_back(self, model: Any) -> tuple[float, float]:
        """Shrink the adapter of `model` until its KL is at most the target; return the KL, and by which factor."""
        import torch

        # Each of several ranks measures the same; rank 0's last bit decides for all.
        kl, scale = agreed(self.kl(model)), 1.0
        matrices = [weight for name, weight in model.named_parameters() if "lora_B" in name]
        for _ in range(_TRIES):
            if kl <= self._target:
                break
            factor = math.sqrt((1 + _BAND) / 2 * self._target / kl)
            with torch.no_grad():
                for weight in matrices:
                    weight.mul_(factor)
            kl, scale = agreed(self.kl(model)), scale * factor
        return kl, scale


def held_out_report(model: Any, kl: float, pairs: Sequence[Pair], beta: float) -> HeldOut:
    """Return how `model` with its adapter ranks `pairs`, held out from its training; `kl` was measured before."""
    margins = []
    for pair in pairs:
        with model.disable_adapter():
            before = _side_log_probs(model, pair)
        after = _side_log_probs(model, pair)
        margins.append(beta * ((after[0] - before[0]) - (after[1] - before[1])))
    mean = sum(margins) / len(margins) if margins else 0.0
    return HeldOut(kl, len(margins), sum(margin > 0 for margin in margins), mean)


def _side_log_probs(model: Any, pair: Pair) -> tuple[float, float]:
    """Return the log-probabilities of the chosen and of the rejected text after the prompt, in nats."""
    import torch

    found = _log_probs(model, pair)
    ids = torch.tensor([*pair["chosen_ids"], *pair["rejected_ids"]], device=found.device)
    each = found.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    n = len(pair["chosen_ids"])
    return float(each[:n].sum()), float(each[n:].sum())


def _log_probs(model: Any, pair: Pair) -> torch.Tensor:
    """Return the log-probabilities of every token at the places of both completions, ``[n_completion, n_vocab]``.

    The prompt is computed once where training does so too.
    """
    import torch

    training, base = model.training, model.get_base_model()
    sides = [pair["prompt_ids"] + pair[side] for side in ("chosen_ids", "rejected_ids")]
    start, width = len(pair["prompt_ids"]), max(map(len, sides))
    ids = torch.tensor([side + [0] * (width - len(side)) for side in sides], device=model.device)
    real = torch.tensor([[1] * len(side) + [0] * (width - len(side)) for side in sides], device=model.device)
    model.eval()
    with torch.no_grad():
        if packs_pairs(base):
            labels = ids.masked_fill(real == 0, -100)
            labels[:, :start] = -100
            hidden = pair_hidden_states(base.base_model, ids, real, labels)
            logits = output_logits(base.get_output_embeddings(), hidden)
        else:
            rows = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, start - 1 : -1]
            logits = rows[real[:, start:] == 1]
        found = logits.float().log_softmax(-1)
    model.train(training)
    return found

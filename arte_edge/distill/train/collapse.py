"""When is an aligned teacher broken? Three signs, each judged against how the training began.

DPO on few pairs can lower the probability of the chosen text itself, and a teacher
then forgets the format it must write or never stops writing. Rewards look fine
meanwhile: the margin grows while both log-probabilities fall. So the teacher is
asked to write a few drafts now and then, and the last adapter that still could is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arte_edge.distill.train.settings import CollapseLimits

__all__ = ["ProbeResult", "chosen_drop_nats", "collapse_reason"]

_RECENT = 4  # steps whose mean is judged: one batch alone is noise


@dataclass(frozen=True)
class ProbeResult:
    """What the teacher wrote for a few held-out prompts."""

    valid_rate: float  # share of drafts that the parser accepts, 0 to 1
    mean_tokens: float  # mean length of what it wrote


def chosen_drop_nats(chosen_rewards: Sequence[float], beta: float) -> float:
    """Return by how much chosen completions lost log-probability against the reference, mean of recent steps.

    `chosen_rewards` is TRL's ``rewards/chosen`` of each step, which is beta times the gain: unlike
    ``logps/chosen`` it does not move with which pairs happen to be in a batch.
    """
    recent = chosen_rewards[-_RECENT:]
    return -sum(recent) / len(recent) / beta if recent else 0.0


def collapse_reason(
    limits: CollapseLimits, start: ProbeResult | None, now: ProbeResult | None, drop_nats: float
) -> str:
    """Return why the teacher counts as broken, in a sentence's worth of words; empty if it does not."""
    if drop_nats > limits.max_chosen_drop_nats:
        limit = limits.max_chosen_drop_nats
        return f"chosen texts lost {drop_nats:.1f} nats of log-probability (limit {limit:g})"
    if start is None or now is None:
        return ""
    floor = limits.min_valid * start.valid_rate
    if now.valid_rate < floor:
        return f"valid drafts fell from {start.valid_rate:.0%} to {now.valid_rate:.0%} (limit {floor:.0%})"
    low, high = start.mean_tokens / limits.length_factor, start.mean_tokens * limits.length_factor
    if start.mean_tokens and not low <= now.mean_tokens <= high:
        return (
            f"mean length went from {start.mean_tokens:.0f} to {now.mean_tokens:.0f} tokens "
            f"(limits {low:.0f} and {high:.0f})"
        )
    return ""

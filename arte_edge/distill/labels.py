"""Which answer counts as a draft's label, when the teacher contradicts itself.

A teacher says an answer when it writes the question (its *target*) and again at the
end of every rationale. Small teachers often disagree with themselves; the policy says
who is believed, and the stage counts what it changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

__all__ = ["Policy", "agrees", "decide"]

Policy = Literal["teacher", "vote", "drop-disagreement"]


def decide(policy: Policy, target: str, answers: Sequence[str | None]) -> str | None:
    """Return the label of a question, or None if it is dropped.

    Args:
        policy: ``teacher`` takes the drafted target; ``vote`` the answer that most of target and
            rationales gave, the target deciding a tie it is part of; ``drop-disagreement`` keeps
            a question only if target and every readable rationale say the same.
        target: the answer drafted with the question, in comparable form.
        answers: the rationales' answers in comparable form; None for one that cannot be read.
    """
    given = [answer for answer in answers if answer is not None]
    if policy == "teacher":
        return target
    if not given:
        return None
    if policy == "drop-disagreement":
        return target if set(given) == {target} else None
    votes = Counter([target, *given])
    top = max(votes.values())
    winners = [answer for answer, n in votes.items() if n == top]
    if len(winners) == 1:
        return winners[0]
    return target if target in winners else None


def agrees(policy: Policy, label: str | None, answer: str | None) -> bool:
    """Return whether a rationale with this answer may be used. The `teacher` policy takes it at its word."""
    return answer is not None and label is not None and (policy == "teacher" or answer == label)

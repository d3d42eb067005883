"""A draft's preference score, with and without the answer bias that the draft induces.

Shown one worked example, a small model leans to some answer whatever is asked. On a
closed answer set such a lean alone moves accuracy, by as much as the set is out of
balance. So each score comes in two forms: as measured, and with the lean taken out by
subtracting, for each answer, its mean log-probability over the preference set
(contextual calibration, Zhao et al. 2021, arXiv 2102.09690, with the set's own
questions in place of content-free ones). That is fair because the set holds every
answer equally often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Score",
    "answer_bias",
    "probabilities",
    "score_answers",
    "score_log_probabilities",
    "score_open",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """Scores of one draft over a preference set of n items; `bias` is 0 for an even spread of answers, at most 1.

    `value` orders drafts as measured, `free` without the induced answer bias.
    """

    value: float
    free: float
    bias: float
    accuracy: float


def score_log_probabilities(logp: Floats, truth: NDArray[np.intp], *, soft: bool) -> Score:
    """Score forced answers.

    Args:
        logp: log-probabilities ``[n_item, n_choice]``; NaN where an item has fewer choices.
        truth: index of the right choice ``[n_item]``.
        soft: take the probability of the right choice (``likelihood``) instead of 1 for right (``forced``).
    """
    rows = np.arange(len(truth))
    raw, free = probabilities(logp, free=False), probabilities(logp, free=True)
    picked = np.nanargmax(raw, axis=1)
    right = picked == truth
    if soft:
        value, without = raw[rows, truth].mean(), free[rows, truth].mean()
    else:
        value, without = right.mean(), (np.nanargmax(free, axis=1) == truth).mean()
    return Score(
        float(value), float(without), answer_bias(picked.tolist(), truth.tolist()), float(right.mean())
    )


def score_answers(answers: Sequence[str | None], targets: Sequence[str], right: Sequence[bool]) -> Score:
    """Score written answers (the paper's exact match); `free` is balanced accuracy, the mean recall of the answers."""
    hits = np.array(right, dtype=float)
    recall = [hits[[t == target for t in targets]].mean() for target in sorted(set(targets))]
    accuracy = float(hits.mean())
    given = [answer for answer in answers if answer is not None]
    return Score(
        accuracy, float(np.mean(recall)), answer_bias(given, list(targets)) if given else 0.0, accuracy
    )


def score_open(log_probabilities: Floats, right: Sequence[bool] = ()) -> Score:
    """Score an open answer set by the mean log-probability (nats) ``[n_item]`` of the right answers."""
    value = float(log_probabilities.mean())
    return Score(value, value, 0.0, float(np.mean(right)) if len(right) else float("nan"))


def probabilities(logp: Floats, *, free: bool) -> Floats:
    """Return each choice's share ``[n_item, n_choice]``; `free` with its mean log-probability taken out first."""
    if free:
        logp = logp - np.nanmean(logp, axis=0, keepdims=True)
    weight = np.exp(logp - np.nanmax(logp, axis=1, keepdims=True))
    return np.asarray(weight / np.nansum(weight, axis=1, keepdims=True))


def answer_bias(given: Sequence[object], targets: Sequence[object]) -> float:
    """Return the total variation distance between the answers given and the right ones."""
    kinds = {*given, *targets}
    return 0.5 * sum(abs(given.count(k) / len(given) - targets.count(k) / len(targets)) for k in kinds)

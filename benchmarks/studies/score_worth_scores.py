"""The scores that the study compares, all from one recorded grid of one student.

Each takes the grid's columns that it is asked for (the preference set, the whole validation set, a half)
and gives one number a draft, higher for better. Kept apart from `arte_edge.distill.preference.scoring`, which has
what a run can choose; these are the candidates, and controls that a good score must beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.distill.preference.scoring import answer_bias, length_effect, probabilities

__all__ = ["SCORES", "UNASKED", "Floats", "bias_of", "draft_scores", "forced_outcome"]

Floats = NDArray[np.float64]
UNASKED = -2  # in a grid's `right`: no text was written for this draft and question
SCORES = {
    "accuracy": "written, exact match (the paper's)",
    "balanced": "written, mean recall of the answers",
    "forced": "answer tag opened, likeliest answer",
    "forced-free": "the same without the induced answer bias",
    "likelihood": "probability of the right answer",
    "likelihood-free": "the same without the induced answer bias",
    "auc": "one answer against the rest, area under the curve, mean over answers",
    "length-controlled": "likelihood-free less what the draft's length explains",
    "shortest": "control: fewest tokens",
    "own-likelihood": "control: what the student itself would have written",
    "random": "control: a die",
}


def draft_scores(grid: Mapping[str, Any], columns: Sequence[int] | None = None) -> dict[str, Floats]:
    """Return every score ``[d]`` on the questions `columns`, the preference set unless given.

    Of a grid without own likelihoods or without some of the texts the scores that need them are left out.
    """
    at = np.asarray(grid["preferred"] if columns is None else columns)
    right, logp, truth = grid["right"][:, at], grid["logp"][:, at].astype(float), grid["truth"][at]
    tokens = np.asarray(grid["tokens"], dtype=float)
    raw = np.array([probabilities(one, free=False) for one in logp])  # [d, k, n_choice]
    free = np.array([probabilities(one, free=True) for one in logp])
    items = np.arange(len(at))
    likelihood_free = free[:, items, truth].mean(1)
    written = {
        "accuracy": (right == 1).mean(1),
        "balanced": np.mean([(right[:, truth == t] == 1).mean(1) for t in np.unique(truth)], axis=0),
    }
    own = {"own-likelihood": np.asarray(grid["own"], dtype=float)} if "own" in grid else {}
    return (written if (right != UNASKED).all() else {}) | {
        "forced": (raw.argmax(2) == truth).mean(1),
        "forced-free": (free.argmax(2) == truth).mean(1),
        "likelihood": raw[:, items, truth].mean(1),
        "likelihood-free": likelihood_free,
        "auc": _auc(raw, truth),
        "length-controlled": likelihood_free - length_effect(likelihood_free, tokens),
        "shortest": -tokens,
        **own,
        "random": np.random.default_rng(0).random(len(tokens)),
    }


def forced_outcome(logp: Floats, truth: NDArray[np.intp]) -> dict[str, Any]:
    """Return what a student makes of questions with the tag opened, from log-probabilities ``[n, n_choice]``."""
    raw, free = probabilities(logp, free=False), probabilities(logp, free=True)
    at = np.arange(len(truth))
    return {
        "forced": int((raw.argmax(1) == truth).sum()),
        "forced_free": int((free.argmax(1) == truth).sum()),
        "probability": round(float(raw[at, truth].mean()), 5),
        "probability_free": round(float(free[at, truth].mean()), 5),
        "nll": round(float(-np.log(raw[at, truth]).mean()), 5),
    }


def bias_of(grid: Mapping[str, Any], columns: Sequence[int] | None = None) -> Floats:
    """Return each draft's induced answer bias ``[d]``: how far its answers' spread is from the right one."""
    at = np.asarray(grid["preferred"] if columns is None else columns)
    given, truth = grid["logp"][:, at].argmax(2), grid["truth"][at].tolist()
    return np.array([answer_bias(row.tolist(), truth) for row in given])


def _auc(share: Floats, truth: NDArray[np.intp]) -> Floats:
    """Return the mean over answers of the chance that a question with it ranks above one without it ``[d]``."""
    found = []
    for answer in np.unique(truth):
        own, other = share[:, truth == answer, answer], share[:, truth != answer, answer]
        above = (own[:, :, None] > other[:, None, :]) + 0.5 * (own[:, :, None] == other[:, None, :])
        found.append(above.mean((1, 2)))
    return np.asarray(np.mean(found, axis=0))

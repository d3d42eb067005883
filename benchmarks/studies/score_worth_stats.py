"""The statistics of the study of scores: checks of a score on a grid, and intervals over whole clusters.

A cluster is what was drawn together, as the drafts of one question or the seeds of one group are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from score_worth_scores import Floats, draft_scores

__all__ = [
    "centred",
    "consistency",
    "distinct_groups",
    "groups_of",
    "mean_interval",
    "partial",
    "pearson",
    "rate",
    "reliability",
    "spearman",
    "with_interval",
]

Places = NDArray[np.intp]
_SPLITS, _DRAWS = 50, 400


def consistency(grid: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return how often the preference set's best and worst rationale are the whole validation set's, or tie with it,
    by score."""
    few, every = draft_scores(grid), draft_scores(grid, range(grid["truth"].size))
    groups = [places for places in groups_of(grid["question"]) if len(places) > 1]
    out = {}
    for key in every:
        told = [places for places in groups if np.ptp(few[key][places]) > 0]
        a, b = few[key], every[key]
        best = [bool(b[places[int(a[places].argmax())]] >= b[places].max()) for places in told]
        worst = [bool(b[places[int(a[places].argmin())]] <= b[places].min()) for places in told]
        kept = {"best": round(float(np.mean(best)), 4), "worst": round(float(np.mean(worst)), 4)}
        out[key] = {**kept, "n": len(told)}
    return out


def reliability(grid: Mapping[str, Any], k: int = 40) -> dict[str, dict[str, float]]:
    """Return the correlations of each score on two sets of `k` questions: all drafts, and within questions."""
    rng = np.random.default_rng(0)
    half = min(k, grid["truth"].size // 2)
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(_SPLITS):
        order = rng.permutation(grid["truth"].size)
        one, two = (draft_scores(grid, part) for part in (order[:half], order[half : 2 * half]))
        for key, a in one.items():
            inside = (centred(values, grid["question"]) for values in (a, two[key]))
            found.setdefault(key, []).append((pearson(a, two[key]), pearson(*inside)))
    means = {key: np.mean(pairs, axis=0).tolist() for key, pairs in found.items()}
    return {
        key: {"all": round(every, 3), "within": round(within, 3), "k": half} for key, (every, within) in means.items()
    }


def pearson(a: Floats, b: Floats) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if np.std(a) > 1e-12 and np.std(b) > 1e-12 else 0.0


def groups_of(question: Sequence[int]) -> list[Places]:
    """Return the places of each question's drafts."""
    keys = np.asarray(question)
    return [np.flatnonzero(keys == key) for key in np.unique(keys)]


def centred(values: Floats, question: Sequence[int]) -> Floats:
    """Return `values` less their question's mean."""
    out = np.array(values, dtype=float)
    for places in groups_of(question):
        out[places] -= out[places].mean()
    return out


def partial(a: Floats, b: Floats, others: Sequence[Floats]) -> float:
    """Return the correlation of the ranks of `a` and `b` that straight lines in the ranks of `others` leave."""
    known = np.column_stack([np.ones(len(a)), *(_ranks(other) for other in others)])

    def left(values: Floats) -> Floats:
        ranks = _ranks(values)
        return np.asarray(ranks - known @ np.linalg.lstsq(known, ranks, rcond=None)[0])

    return pearson(left(a), left(b))


def spearman(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Return the rank correlation of two lists, ties at their mean rank; 0 where one of them does not vary."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: Sequence[float] | Floats) -> Floats:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), dtype=float)


def with_interval(statistic: Callable[[Places], float], clusters: Sequence[Places]) -> list[float]:
    """Return a statistic of places, and its 95 % interval over draws of whole clusters."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(_DRAWS):
        drawn = rng.integers(len(clusters), size=len(clusters))
        found.append(statistic(np.concatenate([clusters[i] for i in drawn])))
    value = statistic(np.concatenate(list(clusters)))
    return [round(value, 3), *(round(float(q), 3) for q in np.quantile(found, (0.025, 0.975)))]


def distinct_groups(runs: Sequence[Mapping[str, Any]]) -> list[Places]:
    """Return the places of the runs of each set of drafts: its seeds are drawn together."""
    found: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(runs):
        found.setdefault(tuple(sorted(row["members"])), []).append(place)
    return [np.array(places) for places in found.values()]


def rate(row: Mapping[str, Any], outcome: str) -> float:
    """Return an outcome of one trained student as a share or a probability."""
    return row[outcome] / row["n"] if outcome in ("right", "forced") else float(row[outcome])


def mean_interval(values: Sequence[float]) -> list[float]:
    """Return the mean of a few values and its 95 % interval by Student's t."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    middle = float(np.mean(values))
    return [round(middle, 4), round(middle - half, 4), round(middle + half, 4)]

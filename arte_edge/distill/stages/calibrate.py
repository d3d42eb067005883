"""Step 2, calibrate: the preference set, found with item response theory (paper, section 3.2).

Several models with several numbers of few-shot examples answer the validation questions; a
two-parameter logistic fit says which questions discriminate strong respondents from weak ones.
Answers are constrained: a respondent that merely lacks the format would otherwise look weak
everywhere. For closed answer sets the preference set holds every answer equally often, or a score on
it would partly measure answer bias (docs/preference-scores.md).

    P(respondent i is right on item j) = 1 / (1 + exp(-α_j (θ_i - β_j)))

θ is the ability of a respondent (a model under some number of shots), β the item's
difficulty, α its discrimination: how sharply the item separates those above β from
those below (A. Birnbaum in Lord & Novick, Statistical Theories of Mental Test
Scores, 1968). The preference set is the k items of largest α.

The estimate is Bayes modal: the marginal likelihood, abilities integrated out over
N(0, 1), times a prior on every item (R. J. Mislevy, Psychometrika 51 (1986) 177–195).
A real matrix has 8 to 20 respondents; there maximum likelihood diverges (an item
that all got right has no finite β, one that splits them cleanly no finite α), so the
prior is not a refinement: without it there is no estimate. As α has a log-normal
prior it is never negative: an item that the weak get right and the strong get wrong,
often a wrong label, ends near zero and at the bottom of the order.

Why not the girth library (0.8): from 200 respondents it recovers α equally well, but it has no prior on β, so
from 8 to 20 its difficulties are far behind (r 0.47 to 0.77 with the truth against 0.74 to 0.87), and its α is at its
bounds for up to half of the items. Measurements: docs/preference-scores.md.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arte_edge.distill.config import ModelConfig, RunConfig
from arte_edge.distill.evaluation import respondent_answers
from arte_edge.distill.prompts import Shot, answer_shots
from arte_edge.distill.run_context import RunContext, Summary
from arte_edge.errors import InputError
from arte_edge.runtimes.loader import is_server


def calibrate(run: RunContext) -> Summary:
    """Write matrix.jsonl (one row per respondent) and preference_set.jsonl (one row per question)."""
    config = run.config.calibrate
    items = run.task.validation[: config.items]
    models = respondents(run.config, closed=run.task.answer.closed)
    inputs = {
        "calibrate": config.model_dump(mode="json"),
        "models": [run.identity(model) for model in models],
        "task": run.task.sha256,
    }
    with run.stage("calibrate", inputs, _describe) as stage:
        if stage.todo:
            rows, matrix = [], []
            for model in models:
                engine = run.engine(model)
                for n_shot in config.shots:
                    shots, what = _shots(run, n_shot), f"{model.model} {n_shot}-shot"
                    right = respondent_answers(run, engine, model, items, shots, what).right
                    rows.append({"model": model.model, "shots": len(shots), "right": right.astype(int).tolist()})
                    matrix.append(right)
            params = fit_2pl(np.array(matrix, dtype=float))
            groups = [item.target for item in items] if run.task.answer.closed else None
            chosen = top_k(params, min(config.k, len(items)), groups)
            stage.write("matrix.jsonl", rows)
            stage.write(
                "preference_set.jsonl",
                (
                    {
                        "input": items[i].input,
                        "target": items[i].target,
                        "discrimination": round(float(params.discrimination[i]), 4),
                        "difficulty": round(float(params.difficulty[i]), 4),
                    }
                    for i in chosen
                ),
            )
            stage.finish(
                {
                    "respondents": len(matrix),
                    "items": len(items),
                    "k": len(chosen),
                    "accuracy_low": float(min(row.mean() for row in matrix)),
                    "accuracy_high": float(max(row.mean() for row in matrix)),
                    "discrimination_chosen": float(params.discrimination[chosen].mean()),
                    "discrimination_all": float(params.discrimination.mean()),
                }
            )
    return stage.summary


def respondents(config: RunConfig, *, closed: bool) -> list[ModelConfig]:
    """Return the models that answer the validation questions."""
    extra = [ModelConfig(model=name) for name in config.calibrate.models]
    # A server may not return log-probabilities; the students and extra models do the ranking then.
    teachers = [] if is_server(config.teacher.model) and closed else [config.teacher]
    return [*teachers, config.student, *extra]


def _shots(run: RunContext, n: int) -> list[Shot]:
    """Return `n` seeds sampled for this number of shots, so that respondents differ in more than length."""
    seeds = list(run.task.seed)
    random.Random(f"{run.config.seed}/calibrate/{n}").shuffle(seeds)
    return answer_shots(seeds, n)


def _describe(summary: Summary) -> str:
    ratio = summary["discrimination_chosen"] / summary["discrimination_all"]
    return (
        f"{summary['k']} of {summary['items']} questions, which discriminate {ratio:.2f} times as sharply as all do on "
        f"average (1.00: no better than a random choice), from {summary['respondents']} respondents"
    )


Floats = NDArray[np.float64]

# log α ~ N(0, 0.5²) puts 95 % of α between 0.38 and 2.7; β ~ N(0, 2²) keeps it on the ability scale.
LOG_DISCRIMINATION_SD = 0.5
DIFFICULTY_SD = 2.0
# Nodes over which abilities are integrated: twice as many change no estimate in its third digit.
ABILITY_NODES = np.linspace(-5.0, 5.0, 81)


@dataclass(frozen=True)
class ItemParameters:
    """The estimates from a response matrix for its items and respondents.

    `solved` is False for an item that nobody got right (or answered): it distinguishes
    no respondents, and its α is little more than the prior.
    """

    discrimination: Floats  # [n_item], above 0
    difficulty: Floats  # [n_item], in standard deviations of ability
    ability: Floats  # [n_respondent], posterior mean
    solved: NDArray[np.bool_]  # [n_item]


def probability(ability: ArrayLike, discrimination: ArrayLike, difficulty: ArrayLike) -> Floats:
    """Return the probability ``[n_respondent, n_item]`` of a right answer under the model above."""
    theta = np.asarray(ability, dtype=np.float64)[:, None]
    logit = np.asarray(discrimination, dtype=np.float64) * (theta - np.asarray(difficulty, dtype=np.float64))
    # tanh never overflows, the textbook 1 / (1 + exp(-x)) does.
    result: Floats = 0.5 * (1 + np.tanh(logit / 2))
    return result


def fit_2pl(responses: ArrayLike) -> ItemParameters:
    """Estimate the items and the respondents of a response matrix.

    Args:
        responses: ``[n_respondent, n_item]`` of 1 (right), 0 (wrong) and NaN (not answered).

    Raises InputError: not a matrix, fewer than two respondents or no item, or another value.
    """
    matrix = _checked(responses)
    # Equal columns share one estimate: exact ties, and no dependence on the order of items.
    patterns, column, copies = np.unique(
        np.where(np.isnan(matrix), -1.0, matrix), axis=1, return_inverse=True, return_counts=True
    )
    column = column.ravel()
    right, wrong = (patterns == 1).astype(np.float64), (patterns == 0).astype(np.float64)
    discrimination, difficulty = _maximise(right, wrong, copies.astype(np.float64))
    weights = _posterior(right * copies, wrong * copies, discrimination, difficulty)[0]
    return ItemParameters(
        discrimination=discrimination[column],
        difficulty=difficulty[column],
        ability=weights @ ABILITY_NODES,
        solved=right.any(axis=0)[column],
    )


def top_k(params: ItemParameters, k: int, groups: Sequence[Hashable] | None = None) -> NDArray[np.intp]:
    """Return the indices ``[k]`` of the most discriminative items, best first.

    Ties go to the smaller index. Items that nobody solved come after all others: the
    student, weaker than most respondents, cannot solve them either, and many of
    them would spoil the set. Items that everybody solved keep
    their place, for a weaker respondent may still fail them. (docs/preference-scores.md)

    With `groups` ``[n_item]`` (the right answer of each item, for a closed answer
    set) every group sends its best items in equal numbers, for a set in which one
    answer prevails rewards a student that leans to it. Balance goes before
    discrimination: seats left over by an uneven division, or by a group too small,
    go to the best of the others.

    Raises InputError: `k` is below 1 or above the number of items; ValueError: `groups` has not one entry an item.
    """
    n_item = params.discrimination.size
    if not 1 <= k <= n_item:
        raise InputError(
            f"A preference set of {k} questions cannot be taken from {n_item} validation questions",
            f"Ask for 1 to {n_item}, or add validation questions.",
        )
    order = np.lexsort((np.arange(n_item), -params.discrimination, ~params.solved))
    if groups is None:
        return order[:k]
    if len(groups) != n_item:
        raise ValueError(f"{len(groups)} groups for {n_item} items")
    seen: Counter[Hashable] = Counter()
    rounds = np.empty(n_item, dtype=np.intp)  # how many better items its own group has
    for place, item in enumerate(order):
        rounds[place] = seen[groups[item]]
        seen[groups[item]] += 1
    return order[np.sort(np.argsort(rounds, kind="stable")[:k])]


def _checked(responses: ArrayLike) -> Floats:
    matrix = np.asarray(responses, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] < 2 or matrix.shape[1] < 1:
        raise InputError(
            f"Item response theory needs a matrix of respondents by items, not {matrix.shape}",
            "Score at least two models, or one model under two numbers of shots, on the same questions.",
        )
    odd = matrix[~np.isnan(matrix) & (matrix != 0) & (matrix != 1)]
    if odd.size:
        raise InputError(f"A response is 0, 1 or missing, not {odd[0]:g}", "Turn scores into right or wrong first.")
    return matrix


def _posterior(right: Floats, wrong: Floats, discrimination: Floats, difficulty: Floats) -> tuple[Floats, Floats]:
    """Return each respondent's weights over the nodes ``[n_respondent, n_node]`` and log evidence."""
    from scipy.special import log_expit, logsumexp

    logit = discrimination[:, None] * (ABILITY_NODES - difficulty[:, None])  # [n_item, n_node]
    prior = -0.5 * ABILITY_NODES**2
    joint = right @ log_expit(logit) + wrong @ log_expit(-logit) + prior - logsumexp(prior)
    evidence = logsumexp(joint, axis=1)
    return np.exp(joint - evidence[:, None]), evidence


def _maximise(right: Floats, wrong: Floats, copies: Floats) -> tuple[Floats, Floats]:
    """Return α and β ``[n_pattern]`` at the maximum of the marginal posterior.

    The gradient is Fisher's identity: that of the complete-data likelihood, averaged
    over the current abilities (Bock & Aitkin, Psychometrika 46 (1981) 443–459).
    """
    from scipy.optimize import minimize

    n_item = copies.size
    weighted_right, weighted_wrong = right * copies, wrong * copies

    def negative_log_posterior(point: Floats) -> tuple[float, Floats]:
        log_alpha, beta = point[:n_item], point[n_item:]
        alpha = np.exp(log_alpha)
        weights, evidence = _posterior(weighted_right, weighted_wrong, alpha, beta)
        logit = alpha[:, None] * (ABILITY_NODES - beta[:, None])
        surprise = weighted_right.T @ weights - (weighted_right + weighted_wrong).T @ weights * (
            0.5 * (1 + np.tanh(logit / 2))
        )
        log_prior = -0.5 * copies @ ((log_alpha / LOG_DISCRIMINATION_SD) ** 2 + (beta / DIFFICULTY_SD) ** 2)
        slope_alpha = (surprise * logit).sum(axis=1) - copies * log_alpha / LOG_DISCRIMINATION_SD**2
        slope_beta = -alpha * surprise.sum(axis=1) - copies * beta / DIFFICULTY_SD**2
        return -float(evidence.sum() + log_prior), -np.concatenate([slope_alpha, slope_beta])

    share = (right.sum(axis=0) + 0.5) / (right.sum(axis=0) + wrong.sum(axis=0) + 1)
    start = np.concatenate([np.zeros(n_item), np.log((1 - share) / share)])
    found = minimize(
        negative_log_posterior,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 10000, "ftol": 1e-13, "gtol": 1e-6},
    ).x
    return np.exp(found[:n_item]), found[n_item:]

"""A race spends calls where the order is open, ends at its budget, and finds the ends of the full grid."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from arte_edge.distill.preference.adaptive import AdaptivePlan, fit_score_model, interleave_answers

N_QUESTION, N_RATIONALE, K = 24, 4, 40
QUESTION = tuple(question for question in range(N_QUESTION) for _ in range(N_RATIONALE))


def made_grid(seed: int, noise: float = 0.06) -> NDArray[np.float64]:
    """A grid like the recorded ones: two thirds of its variance in one direction, items of very different weight."""
    rng = np.random.default_rng(seed)
    common = np.repeat(rng.normal(size=N_QUESTION), N_RATIONALE) + rng.normal(size=N_QUESTION * N_RATIONALE)
    weight = rng.gamma(1.0, 0.06, K)
    return rng.uniform(0, 1, K) + np.outer(common, weight) + rng.normal(0, noise, (len(QUESTION), K))


def run_plan(
    grid: NDArray[np.float64], plan: AdaptivePlan, known: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    values = np.full_like(grid, np.nan) if known is None else known
    while cells := plan.next_round(values):
        for ask in cells:
            assert np.isnan(values[ask.draft, list(ask.items)]).all(), "a cell was asked for twice"
            values[ask.draft, list(ask.items)] = grid[ask.draft, list(ask.items)]
    return values


def agreement(grid: NDArray[np.float64], score: NDArray[np.float64]) -> float:
    """Share of best and worst rationales that are those of the full grid, or tied with them."""
    same = []
    for question in range(N_QUESTION):
        drafts = [draft for draft, key in enumerate(QUESTION) if key == question]
        for sign in (1, -1):
            true = max(drafts, key=lambda d: sign * grid[d].mean())
            found = max(drafts, key=lambda d: sign * score[d])
            gap = grid[true] - grid[found]
            same.append(true == found or abs(gap.mean()) <= gap.std(ddof=1) / math.sqrt(K))
    return float(np.mean(same))


def test_a_quarter_of_the_grid_finds_the_pairs_that_a_fixed_quarter_does_not() -> None:
    raced, fixed = [], []
    for seed in range(6):
        grid = made_grid(seed)
        values = run_plan(grid, AdaptivePlan(QUESTION, K))
        assert np.isfinite(values).mean() <= 0.25
        raced.append(agreement(grid, fit_score_model(values).mean))
        fixed.append(agreement(grid, grid[:, : K // 4].mean(axis=1)))
    assert np.mean(raced) >= 0.95
    assert np.mean(raced) > np.mean(fixed)


def test_the_same_measurements_give_the_same_next_round() -> None:
    grid, rules = made_grid(0), AdaptivePlan(QUESTION, K)
    half = np.full_like(grid, np.nan)
    for ask in rules.next_round(half):  # a race that was killed after its first round
        half[ask.draft, list(ask.items)] = grid[ask.draft, list(ask.items)]
    assert rules.next_round(half) == rules.next_round(half.copy())
    np.testing.assert_array_equal(run_plan(grid, rules, half), run_plan(grid, rules))


def test_drafts_that_are_clearly_apart_are_not_asked_further() -> None:
    level = np.tile([0.9, 0.6, 0.4, 0.1], N_QUESTION)
    grid = level[:, None] + np.random.default_rng(0).normal(0, 0.01, (len(QUESTION), K))
    rules = AdaptivePlan(QUESTION, K, share=0.5)
    values = run_plan(grid, rules)
    first = len(QUESTION) * rules.first + len(rules.pilots) * (K - rules.first)
    assert np.isfinite(values).sum() == first
    assert rules.risk(fit_score_model(values)).max() < rules.error


@given(
    n_question=st.integers(1, 6),
    n_rationale=st.integers(1, 5),
    k=st.integers(2, 12),
    share=st.sampled_from([0.1, 0.25, 0.6, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_every_race_ends_within_its_budget_with_every_draft_measured(
    n_question: int, n_rationale: int, k: int, share: float, seed: int
) -> None:
    question = tuple(q for q in range(n_question) for _ in range(n_rationale))
    rules = AdaptivePlan(question, k, share)
    grid = np.random.default_rng(seed).normal(size=(len(question), k))
    known = np.isfinite(run_plan(grid, rules))
    assert known.any(axis=1).all() and known.any(axis=0).all()
    assert known.sum() <= rules.most


def test_a_fully_measured_grid_leaves_no_doubt() -> None:
    grid = made_grid(3)
    belief = fit_score_model(grid)
    np.testing.assert_allclose(belief.mean, grid.mean(axis=1))
    assert (belief.variance == 0).all()


def test_the_next_questions_tell_more_about_the_mean_than_any_others_drawn() -> None:
    belief = fit_score_model(made_grid(1, noise=0.01))
    nothing = np.zeros(K, dtype=bool)

    def left(items: list[int]) -> float:
        """Variance of the mean that three measured questions leave."""
        sigma, rest = belief.covariance, [item for item in range(K) if item not in items]
        known = np.linalg.solve(sigma[np.ix_(items, items)], sigma[np.ix_(items, rest)])
        return float((sigma[np.ix_(rest, rest)] - sigma[np.ix_(rest, items)] @ known).sum())

    rng = np.random.default_rng(0)
    drawn = [left(sorted(rng.choice(K, 3, replace=False).tolist())) for _ in range(30)]
    assert left(belief.next_items(nothing, 3)) < min(drawn)
    assert belief.next_items(~nothing, 3) == []


@pytest.mark.parametrize("answers", [["a"] * 5, list("aabbccab"), list("abc"), ["a", "a", "a", "b"]])
def test_every_beginning_holds_the_answers_evenly_and_the_best_items_first(answers: list[str]) -> None:
    order = interleave_answers(answers)
    assert sorted(order) == list(range(len(answers)))
    kinds = set(answers)
    head = [answers[place] for place in order[: len(kinds)]]
    assert set(head) == kinds
    for kind in kinds:
        places = [place for place in order if answers[place] == kind]
        assert places == sorted(places)

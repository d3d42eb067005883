"""The fit finds the parameters that made the data, and survives the matrices that real runs give."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from tiny import Patch

from arte_edge.distill.stages import calibrate
from arte_edge.distill.stages.calibrate import ItemParameters, fit_2pl, probability, top_k
from arte_edge.errors import InputError

Floats = NDArray[np.float64]
numbers = st.floats(-30, 30)


def simulate(n_respondent: int, n_item: int, seed: int) -> tuple[Floats, Floats, Floats, Floats]:
    """True discrimination, difficulty, ability and the responses drawn from them."""
    rng = np.random.default_rng(seed)
    alpha, beta = rng.lognormal(0, 0.5, n_item), rng.normal(0, 1, n_item)
    ability = rng.normal(0, 1, n_respondent)
    right = rng.random((n_respondent, n_item)) < probability(ability, alpha, beta)
    return alpha, beta, ability, right.astype(np.float64)


def parameters(alpha: list[float], solved: list[bool] | None = None) -> ItemParameters:
    n = len(alpha)
    flags = np.array(solved) if solved else np.ones(n, dtype=bool)
    return ItemParameters(np.array(alpha), np.zeros(n), np.zeros(3), flags)


def log_posterior(responses: Floats, alpha: Floats, beta: Floats) -> float:
    """The marginal posterior written out respondent by respondent, on another grid."""
    theta = np.linspace(-6, 6, 400)
    density = np.exp(-(theta**2) / 2)
    total = -0.5 * float(np.sum((np.log(alpha) / 0.5) ** 2 + (beta / 2.0) ** 2))
    for row in responses:
        likelihood = density.copy()
        for answer, a, b in zip(row, alpha, beta, strict=True):
            chance = 1 / (1 + np.exp(-a * (theta - b)))
            likelihood *= 1.0 if np.isnan(answer) else chance if answer else 1 - chance
        total += float(np.log(likelihood.sum() / density.sum()))
    return total


def test_parameters_are_recovered_from_200_respondents() -> None:
    found = []
    for seed in range(4):
        alpha, beta, ability, responses = simulate(200, 100, seed)
        fit = fit_2pl(responses)
        pairs = ((fit.discrimination, alpha), (fit.difficulty, beta), (fit.ability, ability))
        found.append([np.corrcoef(one, other)[0, 1] for one, other in pairs])
        # Seed 3 holds an item of α 5.3 that one respondent in 200 got right: nobody can know that α,
        # and the linear correlation hangs on it (0.81). The logarithm judges all items alike.
        assert np.corrcoef(np.log(fit.discrimination), np.log(alpha))[0, 1] > 0.85
        assert np.median(fit.discrimination) == pytest.approx(np.median(alpha), rel=0.15)
    assert (np.median(found, axis=0) >= [0.90, 0.95, 0.95]).all(), found
    assert np.min(found, axis=0)[1:].min() > 0.93, found


def test_estimates_are_the_maximum_of_the_posterior_they_claim() -> None:
    responses = simulate(10, 6, 3)[3]
    responses[2, 1] = np.nan
    responses[:, 5] = responses[:, 0]
    fit = fit_2pl(responses)
    top = log_posterior(responses, fit.discrimination, fit.difficulty)
    rng = np.random.default_rng(0)
    for _ in range(100):
        factor, shift = np.exp(rng.normal(0, 0.1, 6)), rng.normal(0, 0.1, 6)
        assert log_posterior(responses, fit.discrimination * factor, fit.difficulty + shift) < top


def test_a_finer_grid_of_abilities_gives_the_same_estimates(monkeypatch: Patch) -> None:
    responses = simulate(20, 100, 0)[3]
    coarse = fit_2pl(responses)
    monkeypatch.setattr(calibrate, "ABILITY_NODES", np.linspace(-5, 5, 161))
    fine = fit_2pl(responses)
    np.testing.assert_allclose(coarse.discrimination, fine.discrimination, atol=5e-4)
    np.testing.assert_allclose(coarse.difficulty, fine.difficulty, atol=5e-4)


@given(st.floats(0.01, 10), numbers, st.lists(numbers, min_size=2, max_size=10))
def test_the_chance_of_a_right_answer_rises_with_ability(alpha: float, beta: float, abilities: list[float]) -> None:
    chance = probability(sorted(abilities), [alpha], [beta])[:, 0]
    assert ((chance >= 0) & (chance <= 1)).all()
    assert (np.diff(chance) >= 0).all()
    assert probability([beta], [alpha], [beta])[0, 0] == 0.5
    assert probability([1e4, -1e4], [5.0], [0.0])[:, 0].tolist() == [1.0, 0.0]  # no overflow


def test_the_order_of_respondents_and_of_items_does_not_matter() -> None:
    responses, rng = simulate(16, 60, 1)[3], np.random.default_rng(0)
    fit, order = fit_2pl(responses), rng.permutation(16)
    other = fit_2pl(responses[order])
    np.testing.assert_allclose(other.discrimination, fit.discrimination, atol=1e-6)
    np.testing.assert_allclose(other.ability, fit.ability[order], atol=1e-6)
    order = rng.permutation(60)
    other = fit_2pl(responses[:, order])
    for name in ("discrimination", "difficulty", "solved"):
        assert np.array_equal(getattr(other, name), getattr(fit, name)[order])


cells = st.sampled_from([0.0, 1.0, np.nan])


@settings(max_examples=30, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(2, 12), st.integers(1, 15)), elements=cells))
def test_no_small_matrix_makes_the_estimates_explode(responses: Floats) -> None:
    fit = fit_2pl(responses)
    assert fit.ability.shape == responses.shape[:1]
    assert fit.discrimination.shape == fit.difficulty.shape == fit.solved.shape == responses.shape[1:]
    assert ((fit.discrimination > 0.02) & (fit.discrimination < 20)).all()
    assert (np.abs(fit.difficulty) < 10).all()
    assert (np.abs(fit.ability) < 5).all()


def test_items_all_right_or_all_wrong_are_at_the_ends_and_wrong_labels_at_the_bottom() -> None:
    responses = simulate(12, 40, 2)[3]
    responses[:, 3], responses[:, 7] = 1, 0
    fit = fit_2pl(responses)
    assert fit.difficulty[3] == fit.difficulty.min() and fit.difficulty[7] == fit.difficulty.max()
    assert fit.solved[3] and not fit.solved[7]
    unsolved = np.flatnonzero(responses.sum(axis=0) == 0)
    assert set(top_k(fit, 40)[-unsolved.size :]) == set(unsolved)
    responses = simulate(20, 60, 4)[3]
    ability = responses.mean(axis=1)
    responses[:, :5] = (ability < np.median(ability))[:, None]  # only the weak are right
    responses[:, 5:10] = np.random.default_rng(0).random((20, 5)) < 0.5  # coin tosses
    alpha = fit_2pl(responses).discrimination
    assert set(np.argsort(alpha)[:5]) == set(range(5)) and alpha[:5].max() < 0.5
    assert alpha[5:10].mean() < alpha[10:].mean()


def test_missing_answers_are_left_out_and_nothing_answered_is_the_prior() -> None:
    alpha, beta, ability, responses = simulate(200, 60, 5)
    responses[np.random.default_rng(0).random(responses.shape) < 0.3] = np.nan
    fit = fit_2pl(responses)
    pairs = ((fit.discrimination, alpha, 0.8), (fit.difficulty, beta, 0.9), (fit.ability, ability, 0.9))
    assert all(np.corrcoef(one, other)[0, 1] > least for one, other, least in pairs)
    responses = simulate(10, 20, 6)[3]
    responses[:, 4] = responses[3, :] = np.nan
    fit = fit_2pl(responses)
    found = (fit.discrimination[4], fit.difficulty[4], fit.ability[3])
    assert found == pytest.approx((1.0, 0.0, 0.0), abs=1e-4)
    assert not fit.solved[4]


@pytest.mark.parametrize(
    ("responses", "told"),
    [
        ([[0, 1]], "respondents by items"),
        ([1, 0, 1], "respondents by items"),
        (np.zeros((3, 0)), "respondents by items"),
        ([[0, 1], [0.5, 1]], "not 0.5"),
        ([[0, 1], [-1, 1]], "not -1"),
    ],
)
def test_what_is_no_response_matrix_is_refused(responses: object, told: str) -> None:
    with pytest.raises(InputError, match=told):
        fit_2pl(responses)


@pytest.mark.parametrize(
    ("alpha", "k", "solved", "groups", "expected"),
    [
        ([0.2, 3.0, 1.0, 2.0], 3, None, None, [1, 3, 2]),  # the best first
        ([1.0, 2.0, 1.0, 2.0, 1.0], 4, None, None, [1, 3, 0, 2]),  # ties by index
        # What nobody solved comes when nothing else is left.
        ([9.0, 1.0, 2.0], 2, [False, True, True], None, [2, 1]),
        ([9.0, 1.0, 2.0], 3, [False, True, True], None, [2, 1, 0]),
        # Groups in equal numbers, each at its best.
        ([5.0, 4.9, 4.8, 4.7, 1.0, 0.9, 0.8, 0.7], 4, None, "TTTTFFFF", [0, 1, 4, 5]),
        ([1.0, 0.9, 3.0, 2.5, 0.2], 3, None, "AABBB", [2, 3, 0]),  # a seat left over goes to the best
        ([0.1, 5.0, 4.0, 3.0, 2.0, 1.0], 4, None, "ABBBBB", [1, 2, 3, 0]),  # so do those of a group too small
    ],
)
def test_top_k(alpha: Any, k: int, solved: Any, groups: str | None, expected: list[int]) -> None:
    assert top_k(parameters(alpha, solved), k, groups=groups).tolist() == expected


def test_items_with_equal_answers_are_ties() -> None:
    responses = np.tile(simulate(8, 5, 7)[3], (1, 3))  # every item three times
    order = top_k(fit_2pl(responses), 15).tolist()
    assert all(order.index(i) < order.index(i + 5) < order.index(i + 10) for i in range(5))


@given(st.lists(st.tuples(st.floats(0.1, 3), st.sampled_from("ABC")), min_size=1, max_size=40), st.data())
def test_a_balanced_set_is_as_even_as_the_groups_allow(items: list[tuple[float, str]], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(items)))
    groups = [group for _, group in items]
    chosen = top_k(parameters([alpha for alpha, _ in items]), k, groups=groups)
    assert len(set(chosen.tolist())) == k
    taken, there = Counter(groups[i] for i in chosen), Counter(groups)
    most = max(taken.values())
    assert all(taken[group] >= min(most - 1, there[group]) for group in there)


def test_an_impossible_k_or_groups_of_other_items_are_refused() -> None:
    params = parameters([1.0, 2.0, 3.0])
    for k in (0, -1, 4):
        with pytest.raises(InputError, match=f"{k} questions cannot be taken from 3"):
            top_k(params, k)
    with pytest.raises(ValueError, match="2 groups for 3 items"):
        top_k(params, 2, groups=["A", "B"])

"""Preference scores: what a draft teaches, apart from the answer that it makes the student lean to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from arte_edge.distill.scores import score_answers, score_log_probabilities, score_open

Floats = NDArray[np.float64]
N = 40
TRUTH = np.array([0, 1] * (N // 2))


def knowledge(strength: float, seed: int = 0) -> Floats:
    """Log-probabilities ``[n, 2]`` of a student that leans to the right answer by `strength` nats."""
    logits = np.random.default_rng(seed).normal(size=(N, 2))
    logits[np.arange(N), TRUTH] += strength
    return logits


@pytest.mark.parametrize("soft", [True, False])
def test_a_draft_that_only_shifts_the_answer_bias_moves_the_measured_score_alone(soft: bool) -> None:
    fair = score_log_probabilities(knowledge(1.0), TRUTH, soft=soft)
    leaning = score_log_probabilities(knowledge(1.0) + np.array([4.0, 0.0]), TRUTH, soft=soft)
    assert fair.value - leaning.value > 0.05
    assert leaning.free == pytest.approx(fair.free, abs=1e-9)
    assert leaning.bias > fair.bias + 0.3


@pytest.mark.parametrize("soft", [True, False])
def test_the_bias_free_score_still_tells_a_good_draft_from_a_bad_one(soft: bool) -> None:
    good = score_log_probabilities(knowledge(2.0) + np.array([3.0, 0.0]), TRUTH, soft=soft)
    bad = score_log_probabilities(knowledge(0.0), TRUTH, soft=soft)
    assert good.free > bad.free + 0.2


def test_forced_counts_right_answers_and_likelihood_their_probability() -> None:
    logp = np.log([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]])
    truth = np.array([0, 1, 1, 0])
    forced = score_log_probabilities(logp, truth, soft=False)
    assert forced.value == forced.accuracy == 0.75
    likelihood = score_log_probabilities(logp, truth, soft=True)
    assert likelihood.value == pytest.approx((0.9 + 0.4 + 0.7 + 0.8) / 4)
    assert likelihood.accuracy == 0.75


def test_an_item_with_fewer_choices_has_nan_and_counts_among_its_own() -> None:
    logp = np.array([[0.0, 0.0, np.nan], [0.0, 0.0, 0.0]])
    score = score_log_probabilities(logp, np.array([0, 0]), soft=True)
    assert score.value == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert score.free == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert np.isfinite([score.value, score.free, score.bias]).all()


def test_always_the_same_answer_has_the_bias_of_the_rest() -> None:
    logp = np.tile([0.0, -5.0], (N, 1))
    assert score_log_probabilities(logp, TRUTH, soft=True).bias == pytest.approx(0.5)
    perfect = np.where(np.eye(2)[TRUTH] == 1, 0.0, -5.0)
    assert score_log_probabilities(perfect, TRUTH, soft=True).bias == 0.0


@settings(deadline=None, max_examples=60)
@given(
    logp=arrays(np.float64, (12, 3), elements=st.floats(-50, 0)),
    truth=arrays(np.intp, 12, elements=st.integers(0, 2)),
    soft=st.booleans(),
)
def test_every_part_of_a_score_lies_between_0_and_1(
    logp: Floats, truth: NDArray[np.intp], soft: bool
) -> None:
    score = score_log_probabilities(logp, truth, soft=soft)
    for part in (score.value, score.free, score.bias, score.accuracy):
        assert -1e-9 <= part <= 1 + 1e-9


def test_written_answers_free_of_bias_are_the_mean_recall() -> None:
    # Three quarters of the set are "yes": always saying "yes" is worth nothing.
    targets = ["yes"] * 6 + ["no"] * 2
    score = score_answers(["yes"] * 8, targets, [target == "yes" for target in targets])
    assert score.value == score.accuracy == 0.75
    assert score.free == 0.5
    assert score.bias == pytest.approx(0.25)


def test_answers_that_cannot_be_read_count_as_wrong_and_have_no_bias() -> None:
    score = score_answers([None, None], ["yes", "no"], [False, False])
    assert (score.value, score.free, score.bias) == (0.0, 0.0, 0.0)


def test_open_answers_score_by_their_mean_log_probability() -> None:
    score = score_open(np.array([-1.0, -3.0]))
    assert score.value == score.free == -2.0
    assert score.bias == 0.0 and np.isnan(score.accuracy)
    assert score_open(np.array([-1.0, -3.0]), [True, False]).accuracy == 0.5

"""Which preferences a quantized student keeps: made-up scores with known changes."""

from typing import Any

import numpy as np
import pytest
from tiny import Patch

from arte_edge.distill.preference.quantization_shift import compare, sample_drafts


def rows(*means: float, n: int = 40) -> np.ndarray:
    """Return scores whose rows have these means, with the same noise in each, so that differences are exact."""
    noise = np.random.default_rng(1).normal(0, 0.1, n)
    return np.array([mean + noise - noise.mean() for mean in means])


def test_equal_scores_change_nothing() -> None:
    scores = rows(0.1, 0.4, 0.2, 0.3)
    shift = compare(scores, scores, ["q", "q", "p", "p"])
    assert (shift.best_kept, shift.worst_kept, shift.flips, shift.moved) == (1.0, 1.0, 0, 0.0)
    assert shift.r == pytest.approx(1.0) and shift.r_within == pytest.approx(1.0)
    assert (shift.drafts, shift.items, shift.questions) == (4, 40, 2)


def test_a_flip_counts_beyond_error_only_where_the_first_student_told_the_drafts_apart() -> None:
    full = rows(0.1, 0.4, 0.2, 0.201)
    flipped = rows(0.4, 0.1, 0.201, 0.2)
    shift = compare(full, flipped, ["q", "q", "p", "p"])
    assert shift.best_kept == shift.worst_kept == 0.0
    assert shift.flips == 4 and shift.flips_beyond_error == 4  # differences without any noise
    noisy = full.copy()
    noisy[3] += np.random.default_rng(2).normal(0, 0.5, 40)
    noisy[3] += 0.201 - noisy[3].mean()
    assert compare(noisy, flipped, ["q", "q", "p", "p"]).flips_beyond_error == 2


def test_correlation_within_questions_leaves_out_what_questions_differ_in() -> None:
    full = rows(0.1, 0.2, 0.8, 0.9)
    deployed = rows(0.2, 0.1, 0.9, 0.8)
    shift = compare(full, deployed, [1, 1, 2, 2])
    assert shift.r is not None and shift.r > 0.9
    assert shift.r_within == pytest.approx(-1.0)


def test_a_question_with_one_rationale_has_no_best() -> None:
    shift = compare(rows(0.1, 0.5, 0.3), rows(0.2, 0.4, 0.3), ["a", "b", "c"])
    assert (shift.questions, shift.best_kept, shift.worst_kept, shift.r_within) == (0, None, None, None)


def test_a_sample_takes_whole_questions_from_all_over() -> None:
    question = [q for q in range(20) for _ in range(4)] + [99]
    chosen = sample_drafts(question, 24)
    assert len(chosen) == 24
    taken = sorted({question[d] for d in chosen})
    assert len(taken) == 6 and taken[0] < 4 and taken[-1] > 15 and 99 not in taken
    assert sample_drafts([1, 2, 3], 24) == []
    assert len(sample_drafts(question, 2)) == 4


def test_a_run_that_scores_with_a_quantized_file_says_what_that_changes(
    house: Any, scored: Any, monkeypatch: Patch
) -> None:
    """The deployed student knows other numbers than the one with 16 bits, so their scores differ."""
    deployed = type(house.student)("deployed", knows=lambda n: n % 4 > 0)
    monkeypatch.setattr("arte_edge.distill.stages.prefer.scoring_engine", lambda run, n_score: deployed)
    size = {"calibrate": {"k": 12, "items": 20}}
    shift = scored(prefer={"student_file": "Q4_K_M", "race": "off"}, **size)[1]["deployed"]
    assert 4 <= shift["drafts"] <= 24 and shift["items"] == 12 and shift["moved"] != 0
    # The scripted rationales of a question are all alike, and equal calls are made once.
    assert house.calls - house.scoring_from == shift["questions"] * 12
    assert deployed.calls == 8 * 12  # the sample's scores are not asked for twice
    assert "deployed" not in scored(prefer={"race": "off"}, **size)[1]

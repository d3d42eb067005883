"""Preference scores without the induced answer bias and without length, and the engine that computes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from tiny import Patch

from arte_edge.distill.preference import scoring
from arte_edge.distill.preference.scoring import ChoiceScores, GeneratedScores, Score, length_effect, scoring_engine
from arte_edge.models.resolve import LocalModel
from arte_edge.runtimes.autotune import Candidate

Floats = NDArray[np.float64]
LENGTHS = st.lists(st.integers(1, 400), min_size=12, max_size=60)
MUCH = 500
N = 40
TRUTH = np.array([0, 1] * (N // 2))


def score_of(grid: ChoiceScores | GeneratedScores) -> Score:
    """Return the score of the only draft of a full grid."""
    value, free = (float(grid.values(free=free)[0].mean()) for free in (False, True))
    return Score(value, free, grid.bias(0), grid.accuracy(0))


def score_log_probabilities(logp: Floats, truth: NDArray[np.intp], *, soft: bool) -> Score:
    return score_of(ChoiceScores(np.asarray(logp)[None], truth, soft))


def score_answers(answers: list[str | None], targets: list[str], right: Sequence[bool]) -> Score:
    return score_of(GeneratedScores(np.array([right], dtype=float), [answers], targets))


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
    # A good draft is still told from a bad one.
    good = score_log_probabilities(knowledge(2.0) + np.array([3.0, 0.0]), TRUTH, soft=soft)
    assert good.free > score_log_probabilities(knowledge(0.0), TRUTH, soft=soft).free + 0.2


@pytest.mark.parametrize(
    ("logp", "truth", "soft", "value", "accuracy", "bias"),
    [
        (np.log([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]]), [0, 1, 1, 0], False, 0.75, 0.75, 0.25),
        (np.log([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]]), [0, 1, 1, 0], True, 0.7, 0.75, 0.25),
        # An item with fewer choices has NaN and counts among its own.
        ([[0.0, 0.0, np.nan], [0.0, 0.0, 0.0]], [0, 0], True, (1 / 2 + 1 / 3) / 2, 1.0, 0.0),
        # Always the same answer has the bias of the rest.
        (np.tile([0.0, -50.0], (N, 1)), TRUTH, True, 0.5, 0.5, 0.5),
        (np.where(np.eye(2)[TRUTH] == 1, 0.0, -50.0), TRUTH, True, 1.0, 1.0, 0.0),
    ],
)
def test_the_parts_of_a_score(logp: Any, truth: Any, soft: bool, value: float, accuracy: float, bias: float) -> None:
    score = score_log_probabilities(logp, np.array(truth), soft=soft)
    assert (score.value, score.accuracy, score.bias) == pytest.approx((value, accuracy, bias))
    assert np.isfinite(score.free)


@settings(deadline=None, max_examples=60)
@given(
    logp=arrays(np.float64, (12, 3), elements=st.floats(-50, 0)),
    truth=arrays(np.intp, 12, elements=st.integers(0, 2)),
    soft=st.booleans(),
)
def test_every_part_of_a_score_lies_between_0_and_1(logp: Floats, truth: NDArray[np.intp], soft: bool) -> None:
    score = score_log_probabilities(logp, truth, soft=soft)
    for part in (score.value, score.free, score.bias, score.accuracy):
        assert -1e-9 <= part <= 1 + 1e-9


def test_written_answers_free_of_bias_are_the_mean_recall() -> None:
    # Three quarters of the set are "yes": always saying "yes" is worth nothing.
    targets = ["yes"] * 6 + ["no"] * 2
    score = score_answers(["yes"] * 8, targets, [target == "yes" for target in targets])
    assert (score.value, score.accuracy, score.free, score.bias) == (0.75, 0.75, 0.5, pytest.approx(0.25))
    unreadable = score_answers([None, None], ["yes", "no"], [False, False])
    assert (unreadable.value, unreadable.free, unreadable.bias) == (0.0, 0.0, 0.0)


def test_open_answers_score_by_their_mean_log_probability() -> None:
    score = score_of(ChoiceScores(np.array([[[-1.0], [-3.0]]]), None))
    assert score.value == score.free == -2.0
    assert score.bias == 0.0 and np.isnan(score.accuracy)


@given(LENGTHS, st.integers(0, 2**32), st.floats(-0.2, 0.2))
@settings(deadline=None)
def test_what_length_adds_to_scores_is_taken_out_whatever_it_is(lengths: list[int], seed: int, slope: float) -> None:
    tokens = np.array(lengths, dtype=float)
    plain = np.random.default_rng(seed).random(len(tokens))
    longer = plain + slope * np.log(tokens)
    level = longer - length_effect(longer, tokens)
    assert level.mean() == pytest.approx(longer.mean())
    if np.ptp(tokens) > 0:
        assert np.allclose(level - level.mean(), plain - plain.mean() - length_effect(plain - plain.mean(), tokens))
        assert abs(np.corrcoef(level, np.log(tokens))[0, 1]) < 1e-6


def test_a_few_drafts_and_drafts_of_one_length_are_left_alone() -> None:
    score = np.linspace(0, 1, 30)
    assert not length_effect(score, np.full(30, 9.0)).any()
    assert not length_effect(score[:11], np.arange(1.0, 12.0)).any()
    assert length_effect(score, np.arange(1.0, 31.0)).any()


@pytest.fixture
def by_length(house: Any) -> Any:
    """A house whose drafts differ in length, and whose scores follow their length alone, by all that the rows say."""
    words = house.teacher.word
    house.teacher.word = lambda prompt: f"{words(prompt)} {'so ' * (sum(map(ord, prompt)) % 9)}"

    def choose_each(prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[Floats]:
        rows = []
        for prompt, own in zip(prompts, choices, strict=True):
            right = "odd" if int(prompt.rpartition("Is ")[2].split()[0]) % 2 else "even"
            likely = 0.1 * np.log(prompt.count(" so") + 5)
            rows.append(np.array([likely if c.startswith(right) else -likely for c in own]))
        return rows

    house.student.choose_each = choose_each
    return house


@pytest.mark.parametrize("length_free", [True, False])
def test_drafts_are_ordered_by_what_their_length_does_not_explain_unless_told_otherwise(
    by_length: Any, scored: Any, length_free: bool
) -> None:
    _, summary, rows = scored(prefer={"race": "off", "length_free": length_free}, calibrate={"k": 12, "items": 20})
    assert summary["drafts"] >= 12
    if not length_free:
        assert all(row["score"] == row["bias_free"] and row["length"] == 0 for row in rows)
        return
    assert np.std([row["bias_free"] for row in rows]) > 0.005
    assert np.std([row["score"] for row in rows]) < 0.1 * np.std([row["bias_free"] for row in rows])
    assert all(row["score"] == pytest.approx(row["bias_free"] - row["length"], abs=2e-6) for row in rows)


@pytest.fixture
def measured(house: Any, monkeypatch: Patch, tmp_path: Path) -> dict[str, Any]:
    """What was asked for, and the way that is said to be the fastest."""
    monkeypatch.setenv("ARTE_EDGE_PROBE", "1")
    seen: dict[str, Any] = {"way": Candidate("transformers", "bfloat16"), "asked": [], "opened": []}
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(bytes(2000))

    def fastest_engine(ways: list[Candidate], opening: Any, work: str, facts: list[object]) -> Candidate:
        seen["asked"].append((ways, work, facts))
        seen["engine"] = opening(seen["way"])
        return seen["way"]

    def open_local(model: LocalModel, **how: Any) -> Any:
        seen["opened"].append((model.name, how.get("kind"), how.get("dtype")))
        return house.student

    monkeypatch.setattr(scoring, "fastest_engine", fastest_engine)
    monkeypatch.setattr(scoring, "open_local", open_local)
    monkeypatch.setattr("arte_edge.distill.run_context.open_local", open_local)
    monkeypatch.setattr(LocalModel, "checkpoint", lambda self, progress=None: checkpoint)
    return seen


def test_much_is_scored_by_the_fastest_engine_in_its_floats(house: Any, measured: dict[str, Any]) -> None:
    run = house.run()
    assert scoring_engine(run, MUCH) is house.student
    assert measured["opened"][-1] == ("scripted-student", "transformers", "bfloat16")
    ways, work, facts = measured["asked"][0]
    assert ways[0] == Candidate("llamacpp") and Candidate("transformers", "float32") in ways
    assert work == "choose" and f"sha256 of {run.config.student.model}" in facts
    run.close()
    run = house.run(prefer={"score": "accuracy"})
    scoring_engine(run, MUCH)
    assert measured["asked"][1][1] == "write"
    run.close()


@pytest.mark.parametrize(
    ("tables", "n", "probe", "way"),
    [
        ({}, MUCH, "1", Candidate("llamacpp")),
        ({}, MUCH, "0", None),
        ({}, MUCH - 1, "1", None),
        ({"prefer": {"engine": "student"}}, MUCH, "1", None),
        ({"student": {"model": "scripted-student", "engine": "llamacpp"}}, MUCH, "1", None),
    ],
)
def test_the_students_own_engine_scores_where_it_is_fastest_or_nothing_is_measured(
    house: Any,
    measured: dict[str, Any],
    tables: dict[str, Any],
    n: int,
    probe: str,
    way: Candidate | None,
    monkeypatch: Patch,
) -> None:
    monkeypatch.setenv("ARTE_EDGE_PROBE", probe)
    measured["way"] = way
    run = house.run(**tables)
    assert scoring_engine(run, n) is run.engine(run.config.student)
    assert bool(measured["asked"]) == (way is not None)
    run.close()

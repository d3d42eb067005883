from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arte_edge.distill.calibrate import calibrate
from arte_edge.distill.elicit import elicit
from arte_edge.distill.length import length_share
from arte_edge.distill.prefer import prefer

LENGTHS = st.lists(st.integers(1, 400), min_size=12, max_size=60)


@given(LENGTHS, st.integers(0, 2**32), st.floats(-0.2, 0.2))
@settings(deadline=None)
def test_what_length_adds_to_scores_is_taken_out_whatever_it_is(
    lengths: list[int], seed: int, slope: float
) -> None:
    tokens = np.array(lengths, dtype=float)
    plain = np.random.default_rng(seed).random(len(tokens))
    longer = plain + slope * np.log(tokens)
    level = longer - length_share(longer, tokens)
    assert level.mean() == pytest.approx(longer.mean())
    if np.ptp(tokens) > 0:
        assert np.allclose(
            level - level.mean(), plain - plain.mean() - length_share(plain - plain.mean(), tokens)
        )
        assert abs(np.corrcoef(level, np.log(tokens))[0, 1]) < 1e-6


def test_a_few_drafts_and_drafts_of_one_length_are_left_alone() -> None:
    score = np.linspace(0, 1, 30)
    assert not length_share(score, np.full(30, 9.0)).any()
    assert not length_share(score[:11], np.arange(1.0, 12.0)).any()
    assert length_share(score, np.arange(1.0, 31.0)).any()


def scored(house, **settings):
    """Score drafts whose lengths differ and whose scores follow their length alone, by all that the rows say."""
    words = house.teacher.word
    house.teacher.word = lambda prompt: f"{words(prompt)} {'so ' * (sum(map(ord, prompt)) % 9)}"

    def choose(prefix, suffixes, choices):
        house.student.calls += len(suffixes)
        shown = [(prefix + suffix).count(" so") for suffix in suffixes]
        odd = [int((prefix + suffix).rpartition("Is ")[2].split()[0]) % 2 for suffix in suffixes]
        likely = [0.1 * np.log(n + 5) for n in shown]
        return np.array(
            [
                [x if c.startswith("odd" if o else "even") else -x for c in choices]
                for x, o in zip(likely, odd, strict=True)
            ]
        )

    house.student.choose = choose
    run = house.run(prefer={"race": "off", **settings}, calibrate={"k": 12, "items": 20})
    elicit(run)
    calibrate(run)
    summary, rows = prefer(run), run.read("prefer", "scores.jsonl")
    run.close()
    return summary, rows


def test_drafts_are_ordered_by_what_their_length_does_not_explain(house):
    summary, rows = scored(house)
    assert summary["drafts"] >= 12
    assert np.std([row["bias_free"] for row in rows]) > 0.005
    assert np.std([row["score"] for row in rows]) < 0.1 * np.std([row["bias_free"] for row in rows])
    assert all(row["score"] == pytest.approx(row["bias_free"] - row["length"], abs=2e-6) for row in rows)


def test_a_run_may_order_them_by_the_whole_score(house):
    _, rows = scored(house, length_free=False)
    assert all(row["score"] == row["bias_free"] and row["length"] == 0 for row in rows)

"""Preference pairs: top against bottom, best against worst, ties dropped and counted."""

import random
from typing import Any

import pytest

from arte_edge.distill.preference.dpo_pairs import (
    Ties,
    draw_input_pairs,
    draw_question_pairs,
    draw_rationale_pairs,
    length_report,
    shuffle_sides,
)

Row = dict[str, Any]
NONE = Ties(0.0)


def questions(n: int, spread: float = 0.01) -> list[Row]:
    return [{"id": f"q{i:02}", "input": f"[{i}]", "target": "yes", "score": i * spread} for i in range(n)]


def numbers(side: str) -> set[int]:
    return {int(part.split("]")[0]) for part in side.split("[")[1:]}


def rationale(question: str, technique: int, score: float, text: str = "") -> Row:
    text = text or f"{question} by {technique}"
    return {"question": question, "technique": technique, "score": score, "text": text}


def test_question_pairs_set_the_top_quarter_against_the_bottom_quarter() -> None:
    drawn = draw_question_pairs(questions(15), 30, 2, 4, Ties(0.02), seed=0)  # too few to hold any out
    assert (len(drawn.pairs), drawn.held_out, drawn.ties) == (30, [], 0)
    assert set.union(*(numbers(pair["chosen"]) for pair in drawn.pairs)) == {12, 13, 14}
    assert set.union(*(numbers(pair["rejected"]) for pair in drawn.pairs)) == {0, 1, 2}


@pytest.mark.parametrize(("n", "sides", "of_inputs"), [(40, 5, 5), (12, 5, 4), (8, 4, 2), (2, 1, 1)])
def test_a_side_is_as_long_as_its_prompt_says(n: int, sides: int, of_inputs: int) -> None:
    drawn = draw_question_pairs(questions(n), 6, 5, 4, NONE, seed=0)
    inputs = draw_input_pairs(questions(n), 6, 5, NONE, seed=0)
    for pair in drawn.pairs:
        assert [len(numbers(pair[side])) for side in ("chosen", "rejected")] == [sides, sides] == [pair["n"]] * 2
    for pair in inputs.pairs:
        lengths = [len(pair[side]) for side in ("chosen", "rejected")]
        assert lengths == [of_inputs, of_inputs] == [pair["n"]] * 2


def test_input_pairs_set_the_best_third_against_the_worst_third() -> None:
    drawn = draw_input_pairs(questions(15), 30, 3, NONE, seed=0)
    assert set.union(*(numbers("".join(pair["chosen"])) for pair in drawn.pairs)) == {10, 11, 12, 13, 14}
    assert set.union(*(numbers("".join(pair["rejected"])) for pair in drawn.pairs)) == {0, 1, 2, 3, 4}


def test_a_side_goes_on_from_the_prefilled_opening() -> None:
    (pair,) = draw_question_pairs(questions(8), 1, 2, 4, NONE, seed=0).pairs
    assert not pair["chosen"].startswith("<Question_4><input>")
    assert pair["chosen"].count("</input><target>yes</target>") == 2
    assert "<Question_5><input>" in pair["chosen"]
    assert pair["chosen"].endswith("</Question_5>")


def test_question_pairs_within_the_gap_are_counted_not_kept() -> None:
    same = draw_question_pairs(questions(16, spread=0.0), 30, 2, 4, Ties(0.02), seed=0)
    assert (same.pairs, same.held_out, same.ties) == ([], [], 30)
    drawn = draw_question_pairs(questions(15), 200, 2, 4, Ties(0.12), seed=0)
    assert drawn.pairs and drawn.ties and len(drawn.pairs) + drawn.ties == 200
    assert min(pair["gap"] for pair in drawn.pairs) >= 0.12 - 1e-9
    for n in (0, 1):  # of which there is no pair
        assert draw_question_pairs(questions(n), 5, 2, 4, NONE, seed=0).pairs == []


def test_a_gap_below_the_standard_error_of_the_scores_is_a_tie() -> None:
    rows = [row | {"standard_error": 0.2} for row in questions(8)]  # gaps of 0.07 at most
    assert draw_question_pairs(rows, 9, 1, 4, Ties(0.0, 1.0), seed=0).pairs == []
    assert len(draw_question_pairs(rows, 9, 1, 4, Ties(0.0, 0.1), seed=0).pairs) == 9
    certain, doubtful = ({"standard_error": error} for error in (0.01, 0.5))
    scored = [rationale("a", 0, 0.9) | certain, rationale("a", 1, 0.6) | certain]
    scored += [rationale("b", 0, 0.9) | doubtful, rationale("b", 1, 0.6) | doubtful]
    drawn = draw_rationale_pairs(scored, 9, 1, Ties(0.02, 1.0), seed=0)
    assert ([pair["question"] for pair in drawn.pairs], drawn.ties) == (["a"], 1)


def test_held_out_drafts_are_in_no_pair_that_is_trained_on() -> None:
    rows = questions(64)
    for drawn in (
        draw_question_pairs(rows, 200, 5, 4, NONE, seed=0),
        draw_input_pairs([row | {"target": f"{i % 4}"} for i, row in enumerate(rows)], 200, 5, NONE, seed=0),
    ):
        held, trained = (
            set.union(*(numbers("".join(pair[side])) for pair in pairs for side in ("chosen", "rejected")))
            for pairs in (drawn.held_out, drawn.pairs)
        )
        assert (len(drawn.held_out), len(held)) == (4, 8) and not held & trained
        assert all(pair["gap"] > 0 and pair["n"] == 1 for pair in drawn.held_out)
    many = [rationale(f"q{i}", t, i + t) for i in range(20) for t in range(4)]
    drawn = draw_rationale_pairs(many, 99, 2, NONE, seed=0)
    held, trained = ({pair["question"] for pair in pairs} for pairs in (drawn.held_out, drawn.pairs))
    assert (len(held), len(trained)) == (2, 18) and not held & trained


def test_the_seed_alone_decides_the_draw() -> None:
    rows = questions(16)
    first = draw_question_pairs(rows, 10, 2, 4, NONE, seed=1)
    assert first == draw_question_pairs(rows[::-1], 10, 2, 4, NONE, seed=1)
    assert first != draw_question_pairs(rows, 10, 2, 4, NONE, seed=2)
    many = [rationale(f"q{i}", t, i + t) for i in range(20) for t in range(4)]
    assert draw_rationale_pairs(many, 5, 1, NONE, 1) == draw_rationale_pairs(many, 5, 1, NONE, 1)
    assert [len(draw_rationale_pairs(many, n, 1, NONE, 1).pairs) for n in (0, 4, 99)] == [0, 4, 18]
    assert draw_rationale_pairs(many, 5, 1, NONE, 1) != draw_rationale_pairs(many, 5, 1, NONE, 2)


def test_a_questions_best_meets_its_worst_and_its_second_best_its_second_worst() -> None:
    rows = [rationale("a", t, score) for t, score in enumerate([0.5, 0.9, 0.2, 0.4])]
    rows += [rationale("b", 0, 0.99), rationale("b", 1, 0.01)]
    for per_question in (1, 2, 3):
        drawn = draw_rationale_pairs(rows, 10, per_question, Ties(0.02), seed=0)
        found = [(pair["chosen"], pair["rejected"], pair["gap"]) for pair in drawn.pairs]
        first = [("a by 1", "a by 2", 0.7), ("b by 0", "b by 1", 0.98)]
        assert sorted(found[:2]) == first and drawn.ties == 0  # so a limit cuts second pairs before first ones
        assert found[2:] == ([("a by 0", "a by 3", 0.1)] if per_question > 1 else [])


def test_near_ties_single_rationales_and_equal_texts_are_dropped_and_counted() -> None:
    rows = [rationale("near", 0, 0.51), rationale("near", 1, 0.50), rationale("single", 0, 0.9)]
    rows += [rationale("same", 0, 0.9, "x"), rationale("same", 1, 0.1, "x")]
    rows += [rationale("good", 0, 0.9), rationale("good", 1, 0.1)]
    drawn = draw_rationale_pairs(rows, 10, 2, Ties(0.02), seed=0)
    assert [pair["question"] for pair in drawn.pairs] == ["good"]
    assert drawn.ties == 3


def test_the_random_control_has_the_same_pairs_and_lots_for_their_sides() -> None:
    pairs = draw_rationale_pairs(
        [rationale(f"q{i}", t, i + t) for i in range(40) for t in range(2)], 99, 1, NONE, seed=0
    ).pairs
    control = shuffle_sides(pairs, random.Random("0/random"))
    swapped = [pair["chosen"] != other["chosen"] for pair, other in zip(pairs, control, strict=True)]
    assert 8 < sum(swapped) < 27
    for pair, other in zip(pairs, control, strict=True):
        assert {pair["chosen"], pair["rejected"]} == {other["chosen"], other["rejected"]}
        assert abs(other["gap"]) == pair["gap"] and other["question"] == pair["question"]


def test_lengths_are_compared() -> None:
    pairs = [{"chosen": "xxxx", "rejected": "x"}, {"chosen": "xx", "rejected": "xx"}]
    assert length_report(pairs) == {"chosen_chars": 3.0, "rejected_chars": 1.5, "chosen_longer": 0.5}
    assert length_report([]) == {"chosen_chars": 0.0, "rejected_chars": 0.0, "chosen_longer": 0.0}

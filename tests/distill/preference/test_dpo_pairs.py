"""Preference pairs: top against bottom, best against worst, ties dropped and counted."""

from typing import Any

from arte_edge.distill.preference.dpo_pairs import draw_question_pairs, draw_rationale_pairs, length_report

Row = dict[str, Any]


def questions(n: int, spread: float = 0.01) -> list[Row]:
    return [{"id": f"q{i:02}", "input": f"[{i}]", "target": "yes", "score": i * spread} for i in range(n)]


def numbers(side: str) -> set[int]:
    return {int(part.split("]")[0]) for part in side.split("[")[1:]}


def rationale(question: str, technique: int, score: float, text: str = "") -> Row:
    text = text or f"{question} by {technique}"
    return {"question": question, "technique": technique, "score": score, "text": text}


def test_question_pairs_set_the_top_quarter_against_the_bottom_quarter() -> None:
    pairs, ties = draw_question_pairs(questions(16), 30, 2, 4, 0.02, seed=0)
    assert (len(pairs), ties) == (30, 0)
    assert set.union(*(numbers(pair["chosen"]) for pair in pairs)) == {12, 13, 14, 15}
    assert set.union(*(numbers(pair["rejected"]) for pair in pairs)) == {0, 1, 2, 3}
    assert all(0.10 <= pair["gap"] <= 0.14 for pair in pairs)


def test_a_side_goes_on_from_the_prefilled_opening() -> None:
    (pair,), _ = draw_question_pairs(questions(8), 1, 2, 4, 0.0, seed=0)
    assert not pair["chosen"].startswith("<Question_4><input>")
    assert pair["chosen"].count("</input><target>yes</target>") == 2
    assert "<Question_5><input>" in pair["chosen"]
    assert pair["chosen"].endswith("</Question_5>")


def test_question_pairs_within_the_gap_are_counted_not_kept() -> None:
    assert draw_question_pairs(questions(16, spread=0.0), 30, 2, 4, 0.02, seed=0) == ([], 30)
    pairs, ties = draw_question_pairs(questions(16), 200, 2, 4, 0.12, seed=0)
    assert pairs and ties and len(pairs) + ties == 200
    assert min(pair["gap"] for pair in pairs) >= 0.12 - 1e-9
    for n in (0, 1):  # of which there is no pair
        assert draw_question_pairs(questions(n), 5, 2, 4, 0.0, seed=0) == ([], 0)


def test_the_seed_alone_decides_the_draw() -> None:
    rows = questions(16)
    first = draw_question_pairs(rows, 10, 2, 4, 0.0, seed=1)
    assert first == draw_question_pairs(rows[::-1], 10, 2, 4, 0.0, seed=1)
    assert first != draw_question_pairs(rows, 10, 2, 4, 0.0, seed=2)
    many = [rationale(f"q{i}", t, i + t) for i in range(20) for t in range(4)]
    assert draw_rationale_pairs(many, 5, 0.0, 1) == draw_rationale_pairs(many, 5, 0.0, 1)
    assert [len(draw_rationale_pairs(many, n, 0.0, 1)[0]) for n in (0, 4, 99)] == [0, 4, 20]
    assert draw_rationale_pairs(many, 5, 0.0, 1) != draw_rationale_pairs(many, 5, 0.0, 2)


def test_a_rationale_pair_is_a_questions_best_against_its_worst() -> None:
    rows = [rationale("a", t, score) for t, score in enumerate([0.5, 0.9, 0.2, 0.4])]
    rows += [rationale("b", 0, 0.99), rationale("b", 1, 0.01)]
    pairs, ties = draw_rationale_pairs(rows, 10, 0.02, seed=0)
    found = {pair["question"]: (pair["chosen"], pair["rejected"], pair["gap"]) for pair in pairs}
    assert found == {"a": ("a by 1", "a by 2", 0.7), "b": ("b by 0", "b by 1", 0.98)}
    assert ties == 0


def test_near_ties_single_rationales_and_equal_texts_are_dropped_and_counted() -> None:
    rows = [rationale("near", 0, 0.51), rationale("near", 1, 0.50), rationale("single", 0, 0.9)]
    rows += [rationale("same", 0, 0.9, "x"), rationale("same", 1, 0.1, "x")]
    rows += [rationale("good", 0, 0.9), rationale("good", 1, 0.1)]
    pairs, ties = draw_rationale_pairs(rows, 10, 0.02, seed=0)
    assert [pair["question"] for pair in pairs] == ["good"]
    assert ties == 3


def test_lengths_are_compared() -> None:
    pairs = [{"chosen": "xxxx", "rejected": "x"}, {"chosen": "xx", "rejected": "xx"}]
    assert length_report(pairs) == {"chosen_chars": 3.0, "rejected_chars": 1.5, "chosen_longer": 0.5}
    assert length_report([]) == {"chosen_chars": 0.0, "rejected_chars": 0.0, "chosen_longer": 0.0}

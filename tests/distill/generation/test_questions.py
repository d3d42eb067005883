"""Draft questions: what is read out of a teacher's answer, and what is refused and why."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arte_edge.distill.generation.questions import (
    Drafts,
    NearDuplicates,
    QuestionPlan,
    QuestionSource,
    draft_questions,
    parse_questions,
)
from arte_edge.errors import EngineError
from arte_edge.runtimes.completion import Completion
from arte_edge.tasks.task import Example


def block(number: int, text: str, target: str) -> str:
    return f"<Question_{number}><input>{text}</input><target>{target}</target></Question_{number}>"


class TestParse:
    def test_well_formed_questions_and_a_missing_closing_tag_is_forgiven(self) -> None:
        text = block(4, " Is 3 < 4?\nSay so. ", "yes") + "\n" + block(5, "b", " no ")
        for forgiven in ("</Question_4>", "</Question_5>", "none of them"):
            found = parse_questions(text.replace(forgiven, ""))
            assert found == [("Is 3 < 4?\nSay so.", "yes"), ("b", "no")]

    def test_the_last_question_may_be_cut_off(self) -> None:
        whole = block(4, "a", "1") + block(5, "bb", "22")
        start = whole.index("<Question_5>") + len("<Question_5>")
        for cut in range(start, whole.index("</target>", start)):
            assert parse_questions(whole[:cut]) == [("a", "1"), "cut off"], whole[:cut]

    @pytest.mark.parametrize(
        "bad",
        [
            "<Question_4><input>a<target>1</target></Question_4>",
            "<Question_4>a</input><target>1</target></Question_4>",
            "<Question_4><input>a</input>1</Question_4>",
            "<Question_4><input>a<input>b</input><target>1</target></Question_4>",  # nested
            block(4, "a", "1<target>2"),
            block(4, "a", "1<ans>2"),
            block(4, "a" * 1501, "1"),
        ],
    )
    def test_tags_that_do_not_close_are_a_reason(self, bad: str) -> None:
        assert parse_questions(bad + block(5, "b", "<=2")) == ["tags do not close", ("b", "<=2")]

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            *((block(4, *parts), "empty input or target") for parts in ((" ", "1"), ("a", ""), ("", ""))),
            *((text, "no question at all") for text in ("", "No.", "<input>a</input><target>1</target>")),
        ],
    )
    def test_an_empty_part_or_no_question_is_a_reason(self, text: str, reason: str) -> None:
        assert parse_questions(text) == [reason]

    @given(st.text(st.sampled_from("ab<>/\n"), max_size=30) | st.text(max_size=30))
    @settings(deadline=None)
    def test_any_text_gives_pairs_or_reasons(self, text: str) -> None:
        found = parse_questions(block(4, text, "x") + text)
        assert found
        for one in found:
            assert isinstance(one, str) or (all(one) and "<target>" not in one[1])

    @given(st.lists(st.text(st.sampled_from("abc é?\n"), min_size=1).filter(str.strip), min_size=1, max_size=5))
    @settings(deadline=None)
    def test_what_is_written_in_the_tags_is_read_back(self, texts: list[str]) -> None:
        text = "\n".join(block(i, t, t.strip()) for i, t in enumerate(texts, 4))
        assert parse_questions(text) == [(t.strip(), t.strip()) for t in texts]


def rouge_l(a: str, b: str) -> float:
    from rouge_score import rouge_scorer

    return float(rouge_scorer.RougeScorer(["rougeL"]).score(a, b)["rougeL"].fmeasure)


class TestNearDuplicates:
    def test_the_threshold_itself_is_a_duplicate(self) -> None:
        # Seven of ten words in order: ROUGE-L F1 is 0.7.
        known = "a b c d e f g h i j"
        assert NearDuplicates(0.7, [known]).find("a b c d e f g x y z") == known
        assert NearDuplicates(0.7, [known]).find("a b c d e f w x y z") is None

    def test_the_order_of_words_counts(self) -> None:
        known = "one two three four five six"
        assert NearDuplicates(0.7, [known]).find("six five four three two one") is None
        assert NearDuplicates(0.7, [known]).find("One, two; three four -- five SIX!") == known

    def test_a_new_text_is_known_once_added(self) -> None:
        near = NearDuplicates(0.7, [])
        assert near.find("turn on the lamp") is None
        near.add("turn on the lamp")
        assert near.find("turn on the lamp") == "turn on the lamp"

    @pytest.mark.parametrize("text", ["Включи свет в кухне", "打开厨房的灯", "( [ { } ] )"])
    def test_a_text_without_latin_words_repeats_itself(self, text: str) -> None:
        near = NearDuplicates(0.7, [text, "another"])
        assert near.find(f" {text} ") == text
        assert near.find(text[:-1] + "?!") is None

    # Thresholds at which threshold × words is rounded up past the whole number it stands for.
    @settings(deadline=None, max_examples=100)
    @given(
        a=st.lists(st.sampled_from("abcd"), min_size=1, max_size=12),
        b=st.lists(st.sampled_from("abcd"), min_size=1, max_size=12),
        threshold=st.sampled_from([0.3, 0.5, 0.55, 0.6, 0.7, 0.9, 1.0]),
    )
    @example(a=["a"] * 100, b=["a"] * 55 + ["b"] * 45, threshold=0.55)
    def test_the_shortcut_loses_no_pair_that_rouge_finds(
        self, a: Sequence[str], b: Sequence[str], threshold: float
    ) -> None:
        known, text = " ".join(a), " ".join(b)
        found = NearDuplicates(threshold, [known]).find(text) is not None
        assert found == (rouge_l(known, text) >= threshold)

    @settings(deadline=None, max_examples=100)
    @given(
        texts=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=9), min_size=1, max_size=9),
        threshold=st.sampled_from([0.3, 0.55, 0.7, 1.0, math.inf]),
    )
    def test_it_finds_the_first_of_all_that_rouge_finds(self, texts: Sequence[Sequence[str]], threshold: float) -> None:
        text, *known = (" ".join(words) for words in texts)
        every = (one for one in known if one == text or rouge_l(one, text) >= threshold)
        assert NearDuplicates(threshold, known).find(text) == next(every, None)

    def test_a_text_is_compared_with_few_of_the_known_ones(self) -> None:
        near, rng, n = NearDuplicates(0.7, []), random.Random(0), 1000
        for _ in range(n):
            text = " ".join(f"w{int(50_000 ** rng.random())}" for _ in range(9))  # by Zipf's law
            assert near.find(text) is None
            near.add(text)
        assert near.compared < 0.05 * n * (n - 1) / 2


def drafted(house: Any, wanted: int) -> Drafts:
    run = house.run()
    teacher, plan = run.config.teacher, QuestionPlan(run.config.elicit, wanted, 1.0, 0, 0)
    engine = run.engine(teacher)
    return draft_questions(run, engine, plan, "drafts", QuestionSource(run, engine, plan))


VARIED = (
    Example("Do nine ducks walk in the park in two rows?", "odd"),
    Example("Twelve eggs fill a box", "even"),
    Example("My house number is 31", "odd"),
)


def refused(house: Any, text: str, target: str) -> dict[str, int]:
    """Return the reasons against one draft that stands among good ones."""
    good = house.teacher.drafts
    bad = f"\n{block(9, text, target)}"
    house.teacher.drafts = lambda i: good(i) + (bad if i == 0 else "")
    drafts = drafted(house, 10)
    assert text.strip() not in {row["input"] for row in drafts.valid}
    return drafts.reasons()


class TestDrafting:
    def test_enough_valid_ones_and_no_more(self, house: Any) -> None:
        drafts = drafted(house, 7)
        assert len({row["id"] for row in drafts.valid}) == len(drafts.valid) == 7
        assert all(row["target"] == "even" for row in drafts.valid)

    @pytest.mark.parametrize(
        ("text", "target", "reason"),
        [
            # All but its words are another text: of the test split only hashes are known.
            ("  is 503 EVEN\n or odd? ", "odd", "overlaps test"),
            ("What becomes of seven halves once doubled?", "odd", "overlaps validation"),
            ("Do nine ducks walk through the park in two rows?", "odd", "repeats a seed"),
            ("some question", "seven", "target is no answer of this task"),
        ],
    )
    def test_a_draft_is_refused_with_the_reason(self, house: Any, text: str, target: str, reason: str) -> None:
        mine = Example("what becomes of seven halves when doubled", "odd")
        house.task = replace(house.task, seed=VARIED, validation=(*house.task.validation, mine))
        assert refused(house, text, target) == {reason: 1}

    def test_where_seeds_repeat_each_other_only_an_exact_repeat_is_refused(self, house: Any) -> None:
        good = house.teacher.drafts
        assert refused(house, "is 3  even or ODD?", "odd") == {"repeats a seed": 1}
        events = (house.folder / "events.jsonl").read_text(encoding="utf-8")
        assert "88% of this task's own seeds" in events
        house.folder = house.folder.with_name("another run")
        house.teacher.drafts = lambda i: f"Is 77 even or odd?</input><target>odd</target>\n{good(i)}"
        assert "Is 77 even or odd?" in {row["input"] for row in drafted(house, 5).valid}

    def test_a_repeated_draft_is_refused(self, house: Any) -> None:
        once = house.teacher.drafts(0)
        house.teacher.drafts = lambda i: once
        drafts = drafted(house, 5)  # four prompts of five questions
        assert (len(drafts.valid), drafts.reasons()) == (5, {"repeats a draft": 15})

    def test_a_server_that_fails_every_call_is_an_engine_error(self, house: Any) -> None:
        failed = Completion("", "error", error="HTTP 500")
        house.teacher.complete = lambda requests, sampling: [failed for _ in requests]
        with pytest.raises(EngineError, match="every call failed: HTTP 500"):
            drafted(house, 7)

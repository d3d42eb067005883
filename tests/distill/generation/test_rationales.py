"""Labels of a teacher that contradicts itself, repeated rationales, and the grammar of a rationale."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.distill.config import LabelPolicy
from arte_edge.distill.generation.rationales import agrees, decide_label, rationale_grammar, reject_repeated
from arte_edge.tasks.answers import canonical
from arte_edge.tasks.task import Answer


@pytest.mark.parametrize(
    ("policy", "answers", "label"),
    [
        ("teacher", ["no", "no", "no"], "yes"),
        ("teacher", [None, None], "yes"),
        ("teacher", [], "yes"),
        ("vote", ["no", "no"], "no"),  # two against the target's one
        ("vote", ["no"], "yes"),  # a tie that the target is part of
        ("vote", ["no", "no", "yes"], "yes"),  # two each
        ("vote", ["no", "no", "maybe", "maybe"], None),  # a tie without the target
        ("vote", ["no", None, None], "yes"),  # what cannot be read has no vote
        ("vote", [None, None], None),
        ("vote", [], None),
        ("drop-disagreement", ["yes", "yes"], "yes"),
        ("drop-disagreement", ["yes", None], "yes"),
        ("drop-disagreement", ["yes", "no"], None),
        ("drop-disagreement", ["no", "no"], None),
        ("drop-disagreement", [None], None),
    ],
)
def test_the_policy_decides_the_label(
    policy: LabelPolicy, answers: list[str | None], label: str | None
) -> None:
    assert decide_label(policy, "yes", answers) == label


def test_the_order_of_the_votes_does_not_matter() -> None:
    answers = ["no", "yes", "no", "maybe"]
    assert {decide_label("vote", "maybe", answers), decide_label("vote", "maybe", answers[::-1])} == {"maybe"}


@pytest.mark.parametrize(
    ("policy", "label", "answer", "usable"),
    [
        ("vote", "yes", "yes", True),
        ("vote", "yes", "no", False),
        ("vote", None, "yes", False),
        ("vote", "yes", None, False),
        ("drop-disagreement", None, "yes", False),
        ("teacher", "yes", "no", True),  # the paper's: a rationale is taken at its word
        ("teacher", "yes", None, False),
    ],
)
def test_a_rationale_is_usable_if_it_ends_at_the_label(
    policy: LabelPolicy, label: str | None, answer: str | None, usable: bool
) -> None:
    assert agrees(policy, label, answer) is usable


def row(question: str, text: str, usable: bool = True) -> dict[str, Any]:
    return {"question": question, "text": text, "usable": usable}


def test_a_text_under_three_of_a_few_questions_is_refused_everywhere() -> None:
    rows = [row(f"q{i}", "Make it warmer. <ans>warmer</ans>") for i in range(3)]
    rows.append(row("q0", "It is cold there. <ans>warmer</ans>"))
    assert reject_repeated(rows) == 3
    assert [r["usable"] for r in rows] == [False, False, False, True]


def test_case_and_spaces_do_not_hide_a_parrot() -> None:
    rows = [row("a", "Make it  warmer."), row("b", "make it warmer."), row("c", " Make it warmer. ")]
    assert reject_repeated(rows) == 3


def test_one_question_may_be_answered_alike_under_every_technique() -> None:
    rows = [row("a", "It is dark.") for _ in range(4)] + [row("b", "It is dark.")]
    assert reject_repeated(rows) == 0


def test_among_many_questions_a_twentieth_may_share_a_text() -> None:
    def rows(alike: int) -> list[dict[str, Any]]:
        return [row(f"q{i}", "Same." if i < alike else f"Own {i}.") for i in range(100)]

    assert reject_repeated(rows(5)) == 0
    assert reject_repeated(rows(6)) == 6


def test_what_was_refused_before_is_not_counted_again_but_still_tells() -> None:
    rows = [row("a", "Same.", usable=False), row("b", "Same."), row("c", "Same.")]
    assert reject_repeated(rows) == 2


@given(st.lists(st.tuples(st.integers(0, 8), st.sampled_from("abcd"), st.booleans()), max_size=40))
def test_never_makes_a_row_usable_and_counts_what_it_changed(drawn: list[tuple[int, str, bool]]) -> None:
    rows = [row(str(question), text, usable) for question, text, usable in drawn]
    before = [r["usable"] for r in rows]
    refused = reject_repeated(rows)
    after = [r["usable"] for r in rows]
    assert all(was or not now for was, now in zip(before, after, strict=True))
    assert sum(before) - sum(after) == refused
    assert reject_repeated(rows) == 0


def rule(answer: Answer) -> str:
    root, rule, last = rationale_grammar(answer, 60).split("\n")
    assert root == 'root ::= [^<]{1,144} "<ans>" answer "</ans>"'
    assert last == ""
    return rule.removeprefix("answer ::= ")


def test_a_closed_set_allows_its_answers_as_they_are_written() -> None:
    assert rule(Answer(kind="choice", choices=("light_on", "off"))) == '"light_on" | "off"'
    assert rule(Answer(kind="boolean")) == '"True" | "False"'


def test_quotes_and_backslashes_in_a_label_are_escaped() -> None:
    assert rule(Answer(kind="choice", choices=('say "hi"', "a\\b"))) == r'"say \"hi\"" | "a\\b"'


def test_letters_are_held_to_their_brackets() -> None:
    assert rule(Answer(kind="choice")) == '"(" [A-Z] ")"'


@pytest.mark.parametrize("number", ["7", "-3", "12.5"])
def test_what_the_number_rule_allows_is_a_number(number: str) -> None:
    assert rule(Answer(kind="number")) == '"-"? [0-9]+ ("." [0-9]+)?'
    assert re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number)
    assert canonical(number, Answer(kind="number")) == number


def test_free_text_stays_on_one_line_and_out_of_tags() -> None:
    assert rule(Answer(kind="text")) == "[^<\\n]+"


@pytest.mark.parametrize("tokens", [8, 60, 512, 100_000])
def test_the_reasoning_ends_within_the_budget_and_within_what_llama_cpp_accepts(tokens: int) -> None:
    match = re.search(r"\{1,(\d+)\}", rationale_grammar(Answer(kind="boolean"), tokens))
    assert match
    assert 16 <= int(match[1]) <= min(max(16, 3 * tokens), 2000)

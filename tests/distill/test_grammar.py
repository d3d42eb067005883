"""The rationale's grammar: reasoning is free, the end is an answer of the task in its tags."""

from __future__ import annotations

import re

import pytest

from arte_edge.distill.grammar import rationale_grammar
from arte_edge.tasks.answers import canonical
from arte_edge.tasks.task import Answer


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

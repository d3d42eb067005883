"""Labels of a teacher that contradicts itself, repeated rationales, and the grammar of a rationale."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.distill.config import LabelPolicy
from arte_edge.distill.generation.rationales import (
    agrees,
    decide_label,
    rationale_grammar,
    reject_repeated,
    short_shots,
    shortened,
)
from arte_edge.distill.latency import Budget, Rates
from arte_edge.distill.run_context import RunContext
from arte_edge.distill.stages.tailor import tailor
from arte_edge.errors import StoppedEarly
from arte_edge.runtimes.completion import Completion, Request, Sampling
from arte_edge.tasks.answers import canonical
from arte_edge.tasks.task import Answer, FewShotExample


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
    assert decide_label(policy, "yes", answers) == decide_label(policy, "yes", answers[::-1]) == label


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


@pytest.mark.parametrize(
    ("rows", "rejected"),
    [
        # Under three of a few questions it is refused everywhere, another text is not.
        (
            [*(row(f"q{i}", "Make it warm. <ans>w</ans>") for i in range(3)), row("q0", "It is cold.")],
            [0, 1, 2],
        ),
        # Case and spaces hide nothing.
        (
            [row("a", "Make it  warmer."), row("b", "make it warmer."), row("c", " Make it warmer. ")],
            [0, 1, 2],
        ),
        # One question may be answered alike under every technique.
        ([*(row("a", "It is dark.") for _ in range(4)), row("b", "It is dark.")], []),
        # Among many questions a twentieth may share a text.
        ([row(f"q{i}", "Same." if i < 5 else f"Own {i}.") for i in range(100)], []),
        ([row(f"q{i}", "Same." if i < 6 else f"Own {i}.") for i in range(100)], list(range(6))),
        # What was refused before is not counted again, but still tells.
        ([row("a", "Same.", usable=False), row("b", "Same."), row("c", "Same.")], [1, 2]),
    ],
)
def test_a_text_that_answers_too_many_questions_is_rejected(
    rows: list[dict[str, Any]], rejected: list[int]
) -> None:
    before = [i for i, r in enumerate(rows) if r["usable"]]
    assert reject_repeated(rows) == len(rejected)
    assert [i for i in before if not rows[i]["usable"]] == rejected


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


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer(kind="choice", choices=("light_on", "off")), '"light_on" | "off"'),
        (Answer(kind="choice", choices=('say "hi"', "a\\b")), r'"say \"hi\"" | "a\\b"'),
        (Answer(kind="choice"), '"(" [A-Z] ")"'),  # letters are held to their brackets
        (Answer(kind="boolean"), '"True" | "False"'),
        (Answer(kind="number"), '"-"? [0-9]+ ("." [0-9]+)?'),
        (Answer(kind="text"), "[^<\\n]+"),  # on one line and out of tags
    ],
)
def test_the_end_of_a_rationale_is_an_answer_of_the_task(answer: Answer, expected: str) -> None:
    assert rule(answer) == expected
    if answer.kind == "number":
        for number in ("7", "-3", "12.5"):
            assert re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number)
            assert canonical(number, answer) == number


@pytest.mark.parametrize("tokens", [8, 60, 512, 100_000])
def test_the_reasoning_ends_within_the_budget_and_within_what_llama_cpp_accepts(tokens: int) -> None:
    match = re.search(r"\{1,(\d+)\}", rationale_grammar(Answer(kind="boolean"), tokens))
    assert match
    assert 16 <= int(match[1]) <= min(max(16, 3 * tokens), 2000)


RATES = Rates(20.0, 200.0, "measured", "")
DEVICE: dict[str, Any] = {"deploy": {"device": "raspberry-pi-5", "max_answer_seconds": 2.0}}
LONG = "well let us see now and once more. " * 3


@dataclass
class Rambling:
    """The scripted teacher, which rambles when it is greedy; of its draws only some are brief and right."""

    inner: Any
    brief: frozenset[int] = frozenset()
    wrong: frozenset[int] = frozenset()
    drawn: list[tuple[str, int]] = field(default_factory=list)
    cut: set[int] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        done = self.inner.complete(requests, sampling)
        return [
            c if r.prompt.endswith("<input>") else self._say(r, c, sampling)
            for r, c in zip(requests, done, strict=True)
        ]

    def _say(self, request: Request, said: Completion, sampling: Sampling) -> Completion:
        self.asked.append(request.prompt)
        if not sampling.temperature:
            return Completion(LONG + said.text, said.finish, 9, 30)
        self.drawn.append((request.prompt, request.sample))
        self.cut.add(sampling.max_tokens)
        if request.sample in self.wrong:
            return Completion("Odd it is. <ans>odd</ans>", "stop", 9, 5)
        if request.sample in self.brief:
            word = self.inner.word(request.prompt)  # no text may stand under every question
            return Completion(f"Draw {request.sample} says {word}. <ans>even</ans>", "stop", 9, 6)
        return Completion(LONG + said.text, said.finish, 9, 30)


def start(house: Any, writer: Rambling, budget: int | None = 8, **tables: Any) -> RunContext:
    house.teacher = writer
    run: RunContext = house.run(tailor={"questions": 8}, **tables)
    run.budget = None if budget is None else Budget(budget, 10, RATES)
    return run


def write(run: RunContext, teacher: Rambling) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    summary = tailor(run, lambda: teacher, "")
    rows = run.read("tailor", "train.jsonl")
    run.close()
    return summary, rows


def most(words: int) -> Any:
    return lambda text: len(text.split()) <= words


def test_a_rationale_is_shortened_to_its_last_clauses_and_keeps_its_answer_whole() -> None:
    text = "It ends in 1. One is odd, so 3.1 of it, and the whole, is odd. <ans>odd</ans>"
    assert shortened(text, most(99)) == text
    assert shortened(text, most(13)) == "One is odd, so 3.1 of it, and the whole, is odd. <ans>odd</ans>"
    assert shortened(text, most(7)) == "And the whole, is odd. <ans>odd</ans>"
    assert shortened(text, most(3)) == "Is odd. <ans>odd</ans>"
    assert shortened(text, most(2)) is None  # not the bare answer: it would teach not to reason
    assert (
        shortened("看着是一，所以是奇数。 <ans>odd</ans>", lambda t: len(t) <= 22)
        == "所以是奇数。 <ans>odd</ans>"
    )


def test_the_teacher_is_shown_what_fits_and_only_under_a_budget(house: Any) -> None:
    worked = (
        FewShotExample(input="Is 1 even or odd?", reasoning="One is alone, so it is odd.", target="odd"),
        FewShotExample(
            input="Is 2 even or odd?", reasoning="Two make a pair and no one is left", target="even"
        ),
        FewShotExample(input="Is 3 even or odd?", reasoning="It ends in 3.", target="odd"),
    )
    house.task = replace(house.task, worked=worked)
    shown: dict[str, Any] = {"teacher": {"model": "scripted-teacher", "shots": 3}}
    teacher = Rambling(house.teacher, brief=frozenset({0}))
    run = start(house, teacher, 5, **DEVICE, **shown)
    assert short_shots(run, run.config.teacher) == [
        ("Is 1 even or odd?", "So it is odd. <ans>odd</ans>"),
        ("Is 3 even or odd?", "It ends in 3. <ans>odd</ans>"),
    ]
    write(run, teacher)
    assert teacher.drawn and teacher.asked
    assert all("So it is odd." in prompt and "alone" not in prompt for prompt in teacher.asked)

    house.folder = house.folder.parent / "other"
    free = Rambling(house.teacher.inner)
    run = start(house, free, None, **shown)
    assert short_shots(run, run.config.teacher) is None
    write(run, free)
    assert free.asked and all("One is alone, so it is odd." in prompt for prompt in free.asked)


def test_a_question_keeps_the_first_draw_that_fits_and_agrees(house: Any) -> None:
    teacher = Rambling(house.teacher, brief=frozenset({2, 3}), wrong=frozenset({1}))
    summary, rows = write(start(house, teacher, **DEVICE), teacher)
    assert [row["rationale"][:12] for row in rows] == ["Draw 2 says "] * 8
    assert summary["drawn_again"] >= 8 and summary["over_budget"] == 0
    # Two waves are allowed, and one was enough.
    assert {sample for _, sample in teacher.drawn} == {0, 1, 2, 3}
    assert teacher.cut == {12}  # what is longer than the budget would not be taken


def test_draws_go_on_for_those_alone_that_lack_one(house: Any) -> None:
    class Uneven(Rambling):
        def _say(self, request: Request, said: Completion, sampling: Sampling) -> Completion:
            early = ord(request.prompt.rpartition("Question: ")[2][0]) % 2
            self.brief = frozenset({0 if early else 6})
            return super()._say(request, said, sampling)

    teacher = Uneven(house.teacher)
    _, rows = write(start(house, teacher, **DEVICE), teacher)
    by_sample = [sum(sample == s for _, sample in teacher.drawn) for s in range(8)]
    assert by_sample[0] == by_sample[3] > by_sample[4] == by_sample[7] > 0
    assert {row["rationale"][:6] for row in rows} == {"Draw 0", "Draw 6"}


def test_draws_do_not_vote(house: Any) -> None:
    teacher = Rambling(house.teacher, brief=frozenset({7}), wrong=frozenset(range(7)))
    _, rows = write(start(house, teacher, **DEVICE), teacher)
    assert {row["label"] for row in rows} == {"even"}
    assert {row["rationale"][:12] for row in rows} == {"Draw 7 says "}


def test_without_draws_or_with_too_long_ones_the_stage_says_so(house: Any) -> None:
    silent = Rambling(house.teacher, brief=frozenset({0}))
    deploy: dict[str, Any] = {"deploy": {**DEVICE["deploy"], "draws": 0}}
    with pytest.raises(StoppedEarly, match="over the latency budget"):
        write(start(house, silent, **deploy), silent)
    assert silent.drawn == []


def test_without_a_budget_nothing_is_drawn(house: Any) -> None:
    teacher = Rambling(house.teacher, brief=frozenset({0}))
    run = start(house, teacher, budget=None)
    summary, rows = write(run, teacher)
    assert teacher.drawn == [] and not {"over_budget", "drawn_again"} & set(summary)
    assert all(row["rationale"].startswith(LONG[:20]) for row in rows)

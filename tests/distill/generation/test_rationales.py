"""Labels of a teacher that contradicts itself, repeated rationales, and the grammar of a rationale."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from arte_edge.asking.form import Form
from arte_edge.distill.config import LabelPolicy
from arte_edge.distill.generation.inputs import Focus
from arte_edge.distill.generation.rationales import (
    agrees,
    decide_label,
    label_rows,
    rationale_grammar,
    rationale_row,
    rationale_sampling,
    reject_repeated,
    short_shots,
    shortened,
)
from arte_edge.distill.latency import Budget, Rates
from arte_edge.distill.run_context import RunContext
from arte_edge.distill.stages.tailor import tailor
from arte_edge.errors import StoppedEarly
from arte_edge.runtimes.completion import Completion, Request, Sampling
from arte_edge.tasks.task import Answer, Example, FewShotExample


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
def test_the_policy_decides_the_label(policy: LabelPolicy, answers: list[str | None], label: str | None) -> None:
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


@pytest.mark.parametrize("policy", ["teacher", "vote", "drop-disagreement"])
def test_a_letter_that_the_question_does_not_offer_has_no_vote(house: Any, policy: LabelPolicy) -> None:
    house.task = replace(house.task, answer=Answer(kind="choice"))
    texts = [f"<ans>{answer}</ans>" for answer in ("(F)", "(F)", "(A)", "", "(A) or (B)")]
    question = {"id": "q", "input": "Which? (A) one (B) two", "target": "(A)"}
    run = house.run()
    rows = [rationale_row(run, question, 0, Completion(text, "stop")) for text in texts]
    labels = label_rows(run, [question], rows, [None], policy)
    assert question["label"] == "(A)"
    assert [row["usable"] for row in rows] == [False, False, True, False, False]
    assert labels["outside_options"] == 2


@pytest.mark.parametrize(
    ("rows", "rejected"),
    [
        # Under three of a few questions it is refused everywhere, another text is not.
        ([*(row(f"q{i}", "Make it warm. <ans>w</ans>") for i in range(3)), row("q0", "It is cold.")], [0, 1, 2]),
        # Case and spaces hide nothing.
        ([row("a", "Make it  warmer."), row("b", "make it warmer."), row("c", " Make it warmer. ")], [0, 1, 2]),
        # One question may be answered alike under every technique.
        ([*(row("a", "It is dark.") for _ in range(4)), row("b", "It is dark.")], []),
        # Among many questions a twentieth may share a text.
        ([row(f"q{i}", "Same." if i < 5 else f"Own {i}.") for i in range(100)], []),
        ([row(f"q{i}", "Same." if i < 6 else f"Own {i}.") for i in range(100)], list(range(6))),
        # What was refused before is not counted again, but still tells.
        ([row("a", "Same.", usable=False), row("b", "Same."), row("c", "Same.")], [1, 2]),
    ],
)
def test_a_text_that_answers_too_many_questions_is_rejected(rows: list[dict[str, Any]], rejected: list[int]) -> None:
    before = [i for i, r in enumerate(rows) if r["usable"]]
    assert reject_repeated(rows) == len(rejected)
    assert [i for i in before if not rows[i]["usable"]] == rejected


@pytest.mark.parametrize("tokens", [8, 60, 512, 100_000])
def test_the_reasoning_ends_within_the_budget_and_within_what_llama_cpp_accepts(tokens: int) -> None:
    match = re.search(r"\{1,(\d+)\}", rationale_grammar(Answer(kind="boolean"), tokens))
    assert match
    assert 16 <= int(match[1]) <= min(max(16, 3 * tokens), 2000)


@pytest.mark.parametrize(("kind", "more"), [("json", 3), ("text", 0)])
def test_json_has_room_besides_the_reasoning(house: Any, kind: Any, more: int) -> None:
    answer = Answer(kind=kind, json_schema="{}" if more else "")
    house.task = replace(house.task, answer=answer, seed=(Example("?", '{"a": "b c"}'),))
    run = house.run()
    assert rationale_sampling(run, run.engine(run.config.teacher), 60).max_tokens == 60 + more
    run.close()


RATES = Rates(20.0, 200.0, "measured", "")
DEVICE: dict[str, Any] = {"deploy": {"device": "raspberry-pi-5", "max_answer_seconds": 2.0}}
LONG = "well let us see now and once more. " * 3


@dataclass
class Rambling:
    """What the scripted teacher says: too much when it is greedy; of its draws some are brief, some wrong."""

    brief: Sequence[int] = ()
    wrong: Sequence[int] = ()
    uneven: bool = False  # half of the questions get their brief draw in the second wave
    drawn: list[int] = field(default_factory=list)
    cut: set[int] = field(default_factory=set)
    prompts: list[str] = field(default_factory=list)

    def __call__(self, request: Request, text: str, sampling: Sampling) -> str:
        self.prompts.append(request.prompt)
        question = request.prompt.rpartition("Question: ")[2]
        brief = (0 if ord(question[0]) % 2 else 6,) if self.uneven else self.brief
        if sampling.temperature:
            self.drawn.append(request.sample)
            self.cut.add(sampling.max_tokens)
            if request.sample in self.wrong:
                return "Odd it is. <ans>odd</ans>"
            if request.sample in brief:  # no text may stand under every question
                return f"Draw {request.sample} says {question.split()[1]}. <ans>even</ans>"
        return LONG + text


def written(
    house: Any, says: Rambling, budget: int | None = 8, form: Form = "reasoning-first", **tables: Any
) -> tuple[RunContext, dict[str, Any], list[dict[str, Any]]]:
    """Tailor on a device with this budget; return the run, the summary and the training data."""
    house.teacher.say = says
    run: RunContext = house.run(tailor={"questions": 8}, **(DEVICE if budget else {}) | tables)
    run.budget, run.form = budget and Budget(budget, 10, RATES), form
    try:
        return run, tailor(run, None, Focus()), run.read("tailor", "train.jsonl")
    finally:
        run.close()


def test_a_rationale_is_shortened_to_its_last_clauses_and_keeps_its_answer_whole() -> None:
    def within(words: int) -> str | None:
        return shortened(text, lambda t: len(t.split()) <= words)

    text = "It ends in 1. One is odd, so 3.1 of it, and the whole, is odd. <ans>odd</ans>"
    assert within(99) == text
    assert within(13) == "One is odd, so 3.1 of it, and the whole, is odd. <ans>odd</ans>"
    assert within(7) == "And the whole, is odd. <ans>odd</ans>"
    assert within(3) == "Is odd. <ans>odd</ans>"
    assert within(2) is None  # not the bare answer: it would teach not to reason
    chinese = "看着是一，所以是奇数。 <ans>odd</ans>"
    assert shortened(chinese, lambda t: len(t) <= 22) == "所以是奇数。 <ans>odd</ans>"


def test_the_teacher_is_shown_what_fits_and_only_under_a_budget(house: Any) -> None:
    reasons = {1: "One is alone, so it is odd.", 2: "Two make a pair and no one is left", 3: "It ends in 3."}
    house.task = replace(
        house.task,
        worked=tuple(
            FewShotExample(input=f"Is {n} even or odd?", reasoning=why, target="odd" if n % 2 else "even")
            for n, why in reasons.items()
        ),
    )
    shown: dict[str, Any] = {"teacher": {"model": "scripted-teacher", "shots": 3}}
    says = Rambling(brief=[0])
    run, _, _ = written(house, says, 5, **shown)
    assert short_shots(run) == [
        ("Is 1 even or odd?", "So it is odd. <ans>odd</ans>"),
        ("Is 3 even or odd?", "It ends in 3. <ans>odd</ans>"),
    ]
    assert says.drawn and says.prompts
    assert all("So it is odd." in prompt and "alone" not in prompt for prompt in says.prompts)
    house.folder, free = house.folder.parent / "other", Rambling()
    run, _, _ = written(house, free, None, **shown)
    assert short_shots(run) is None
    assert free.prompts and all("One is alone, so it is odd." in prompt for prompt in free.prompts)


def test_a_question_keeps_the_first_draw_that_fits_and_agrees(house: Any) -> None:
    says = Rambling(brief=[2, 3], wrong=[1])
    _, summary, rows = written(house, says)
    assert [row["rationale"][:12] for row in rows] == ["Draw 2 says "] * 8
    assert summary["drawn_again"] >= 8 and summary["over_budget"] == 0
    assert set(says.drawn) == {0, 1, 2, 3}  # two waves are allowed, and one was enough
    assert says.cut == {12}  # what is longer than the budget would not be taken


def test_draws_go_on_for_those_alone_that_lack_one(house: Any) -> None:
    says = Rambling(uneven=True)
    rows = written(house, says)[2]
    by_sample = [says.drawn.count(s) for s in range(8)]
    assert by_sample[0] == by_sample[3] > by_sample[4] == by_sample[7] > 0
    assert {row["rationale"][:6] for row in rows} == {"Draw 0", "Draw 6"}


def test_draws_do_not_vote(house: Any) -> None:
    rows = written(house, Rambling(brief=[7], wrong=range(7)))[2]
    assert {(row["label"], row["rationale"][:12]) for row in rows} == {("even", "Draw 7 says ")}


@pytest.mark.parametrize("by_label", [True, False])
def test_where_the_student_gives_the_answer_alone_no_tags_and_no_reasoning_count(house: Any, by_label: bool) -> None:
    house.by_label = by_label
    says = Rambling()
    _, summary, rows = written(house, says, 1, form="answer")  # "<ans>odd</ans>" is one word, what is in front more
    assert len(rows) == 8 and summary["over_budget"] == summary["drawn_again"] == 0 and not says.drawn
    if by_label:  # a label of the task is what it is
        house.student.count_tokens = lambda text: 99
        assert len(written(house, says, 2, form="answer")[2]) == 8


def test_without_draws_or_a_budget_nothing_is_drawn_and_what_is_too_long_is_counted(house: Any) -> None:
    says = Rambling(brief=[0])
    with pytest.raises(StoppedEarly, match="over the latency budget"):
        written(house, says, deploy={**DEVICE["deploy"], "draws": 0})
    _, summary, rows = written(house, says, budget=None)
    assert not says.drawn and not {"over_budget", "drawn_again"} & set(summary)
    assert all(row["rationale"].startswith(LONG[:20]) for row in rows)

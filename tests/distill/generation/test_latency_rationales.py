"""A teacher that is over the latency budget is shown shorter examples, draws again, and what fits is learnt from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from arte_edge.distill.generation.latency_rationales import short_shots, shortened
from arte_edge.distill.latency import Budget, Rates
from arte_edge.distill.run_context import Run
from arte_edge.distill.stages.tailor import tailor
from arte_edge.errors import StoppedEarly
from arte_edge.runtimes.completion import Completion, Request, Sampling
from arte_edge.store import content_key
from arte_edge.tasks.task import WorkedExample

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


def start(house: Any, writer: Rambling, budget: int | None = 8, **tables: Any) -> Run:
    house.teacher = writer
    run: Run = house.run(tailor={"questions": 8}, **tables)
    run.budget = None if budget is None else Budget(budget, 10, RATES)
    return run


def write(run: Run, teacher: Rambling) -> tuple[dict[str, Any], list[dict[str, Any]]]:
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
        WorkedExample(input="Is 1 even or odd?", reasoning="One is alone, so it is odd.", target="odd"),
        WorkedExample(
            input="Is 2 even or odd?", reasoning="Two make a pair and no one is left", target="even"
        ),
        WorkedExample(input="Is 3 even or odd?", reasoning="It ends in 3.", target="odd"),
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


def test_without_a_budget_nothing_is_drawn_and_no_input_is_new(house: Any) -> None:
    teacher = Rambling(house.teacher, brief=frozenset({0}))
    run = start(house, teacher, budget=None)
    summary, rows = write(run, teacher)
    assert teacher.drawn == [] and not {"over_budget", "drawn_again"} & set(summary)
    assert all(row["rationale"].startswith(LONG[:20]) for row in rows)
    manifest = json.loads((house.folder / "tailor" / "manifest.json").read_text())
    # The inputs of a run from before there was a [deploy]: what was paid for is kept.
    config = run.config
    elicit = {
        "questions": 8,
        "shown": 3,
        "one_draw": False,
        "asked": 5,
        "temperature": 1.0,
        "top_p": 1.0,
        "question_tokens": 300,
        "rationale_tokens": 120,
        "rouge": 0.7,
        "label": "teacher",
        "grammar": True,
        "opinion_shots": 24,
        "max_prompts": 0,
    }
    older = {
        "stage": "tailor",
        "seed": 0,
        "tailor": {
            "questions": 8,
            "temperature": 1.0,
            "label": "vote",
            "even_labels": True,
            "max_prompts": 0,
        },
        "elicit": elicit,
        "teacher": run.identity(config.teacher),
        "adapter": "",
        "task": run.task.sha256,
    }
    assert manifest["inputs"] == content_key(older)

"""Rationales that the device has time for: what the teacher is shown, and what it writes again.

A student writes answers as long as those that it learned from. Under a budget of tokens
(`arte_edge.distill.deploy`) its data must keep within it. Cutting a rationale off spoils the format, and
dropping what is too long loses most of the questions once the budget binds. So the teacher is brought to
write briefly by itself, in two ways:

* *shown*: a teacher writes as long as its worked examples. Those that are too long are shown from a later
  clause on: "It is cold, so more heating is wanted. <ans>warmer</ans>" as "So more heating is wanted.
  <ans>warmer</ans>". The end is kept because it is what the answer follows from.
* *drawn again*: a question that is left without a rationale which agrees with its label and is short enough
  gets draws; the first that does is taken. So the data is the teacher's own, on condition that it fits.
  Draws share their prompt, and stop soon after the budget: what is longer would not be taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from arte_edge.distill.config import ModelConfig
from arte_edge.distill.labels import Policy, agrees
from arte_edge.distill.prompts import ANSWER_OPEN, Worked, teacher_shots
from arte_edge.distill.rationales import rationale_prompt, rationale_row, rationale_sampling
from arte_edge.distill.run import Run
from arte_edge.runtimes.completion import Engine, Request
from arte_edge.tasks.answers import comparable

__all__ = ["brief_shots", "draw_again", "shortened", "too_long"]

Row = dict[str, Any]

_WAVE = 4  # draws a question before looking which questions still lack one
_SLACK = 1.5  # tokens of the teacher, whose tokenizer is another, to one of the student
_CLAUSE = re.compile(r"[,;:.!?]\s+|[，；：。！？、]\s*|\n+")


def too_long(run: Run, rationales: Iterable[Row]) -> list[Row]:
    """Return the rationales that the student could not write in the device's time, in its own tokens."""
    if run.budget is None:
        return []
    fits = _fits(run)
    return [row for row in rationales if not fits(row["text"])]


def brief_shots(run: Run, config: ModelConfig) -> list[Worked] | None:
    """Return the teacher's worked examples as they fit into the budget; None without one: the task's own.

    One that no shortening makes fit is left out.
    """
    if run.budget is None:
        return None
    fits = _fits(run)
    brief = [(shot.question, shortened(shot.answer, fits)) for shot in teacher_shots(run.task, config.shots)]
    return [Worked(question, answer) for question, answer in brief if answer is not None]


def shortened(text: str, fits: Callable[[str], bool]) -> str | None:
    """Return a rationale from the first clause on from which it `fits`, its answer tag whole; None if none does."""
    if fits(text):
        return text
    reasoning, tag, answer = text.rpartition(ANSWER_OPEN)
    for clause in _CLAUSE.finditer(reasoning.rstrip()):
        rest = reasoning[clause.end() :]
        short = rest[:1].upper() + rest[1:] + tag + answer
        if fits(short):
            return short
    return None


def draw_again(
    run: Run,
    engine: Engine,
    config: ModelConfig,
    questions: Sequence[Row],
    rationales: Sequence[Row],
    policy: Policy,
) -> list[Row]:
    """Draw rationales for the labelled questions that have none which agrees and is short enough.

    At most ``deploy.draws`` for each, `_WAVE` at a time. Labels stay as they were decided: a draw does
    not vote. Returns the draws that may be used, as `write_rationales` does; none without a budget.
    """
    if run.budget is None:
        return []
    kind, draws, shots = run.task.answer, run.config.deploy.draws, brief_shots(run, config)
    hold = rationale_sampling(run, engine, run.config.elicit.rationale_tokens)
    sampling = replace(
        hold,
        temperature=run.config.tailor.temperature,
        top_p=run.config.elicit.top_p,
        max_tokens=min(hold.max_tokens, round(run.budget.answer_tokens * _SLACK)),
        seed=run.config.seed + 1,  # as the tailored questions
    )
    found: list[Row] = []
    for first in range(0, draws, _WAVE):
        have = _short_enough(run, [*rationales, *found])
        lacking = [row for row in questions if row["label"] is not None and row["id"] not in have]
        asked = [(row, sample) for row in lacking for sample in range(first, min(first + _WAVE, draws))]
        requests = [
            Request(rationale_prompt(run, engine, config, row["input"], None, shots), sample)
            for row, sample in asked
        ]
        answers = run.calls.complete(engine, requests, sampling, "shorter rationales")
        for (question, _), answer in zip(asked, answers, strict=True):
            row = rationale_row(run, question, -1, answer)
            said = None if row["answer"] is None else comparable(row["answer"], kind)
            row["usable"] = agrees(policy, comparable(question["label"], kind), said)
            if row["usable"]:
                found.append({**row, "drawn": True})
    return found


def _fits(run: Run) -> Callable[[str], bool]:
    """Return whether the student could write a text in the device's time, in its own tokens."""
    assert run.budget is not None
    count, most = run.engine(run.config.student).count_tokens, run.budget.answer_tokens
    return lambda text: count(f" {text.strip()}") <= most


def _short_enough(run: Run, rationales: Sequence[Row]) -> set[str]:
    """Return the questions that have a rationale which may be used and is short enough."""
    usable = [row for row in rationales if row["usable"]]
    long = {id(row) for row in too_long(run, usable)}
    return {row["question"] for row in usable if id(row) not in long}

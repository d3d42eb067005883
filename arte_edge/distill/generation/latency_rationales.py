"""Rationales within a latency budget: shorter few-shot examples, and resampling what is too long.

A student generates answers as long as those that it was trained on. Under a budget of tokens
(`arte_edge.distill.latency`) its training data must fit. Truncating a rationale breaks the format, and
dropping what is too long loses most of the questions once the budget binds. So the teacher is brought to
write briefly by itself, in two ways:

* *short examples*: a teacher generates as much as its few-shot examples. Those that are too long start at
  a later clause: "It is cold, so more heating is wanted. <ans>warmer</ans>" becomes "So more heating is
  wanted. <ans>warmer</ans>". The end stays because the answer follows from it.
* *resampling*: a question without a rationale that agrees with its label and is short enough gets more
  samples; the first that fits is taken. So the data is the teacher's own, conditional on fitting. Samples
  share their prompt, and stop soon after the budget: longer ones would be rejected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from arte_edge.distill.config import LabelPolicy, ModelConfig
from arte_edge.distill.generation.rationales import (
    agrees,
    rationale_prompt,
    rationale_row,
    rationale_sampling,
)
from arte_edge.distill.prompts import ANSWER_OPEN, Worked, teacher_shots
from arte_edge.distill.run_context import Row, Run
from arte_edge.runtimes.completion import Engine, Request
from arte_edge.tasks.answers import comparable

__all__ = ["over_budget", "resample", "short_shots", "shortened"]

_SAMPLES_PER_ROUND = 4  # samples of each question before checking which questions still lack one
_SLACK = 1.5  # tokens of the teacher, whose tokenizer differs, per token of the student
_CLAUSE = re.compile(r"[,;:.!?]\s+|[，；：。！？、]\s*|\n+")


def over_budget(run: Run, rationales: Iterable[Row]) -> list[Row]:
    """Return the rationales that the student could not generate in time, counted in its own tokens."""
    if run.budget is None:
        return []
    fits = _fits(run)
    return [row for row in rationales if not fits(row["text"])]


def short_shots(run: Run, config: ModelConfig) -> list[Worked] | None:
    """Return the teacher's few-shot examples shortened to the budget; None without one: the task's own.

    One that no shortening makes fit is left out.
    """
    if run.budget is None:
        return None
    fits = _fits(run)
    short = [(shot.question, shortened(shot.answer, fits)) for shot in teacher_shots(run.task, config.shots)]
    return [Worked(question, answer) for question, answer in short if answer is not None]


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


def resample(
    run: Run,
    engine: Engine,
    config: ModelConfig,
    questions: Sequence[Row],
    rationales: Sequence[Row],
    policy: LabelPolicy,
) -> list[Row]:
    """Sample rationales for the labelled questions that have none which agrees and is short enough.

    At most ``deploy.draws`` for each question. Labels stay as they were decided: a sample does not vote.
    Returns the usable samples, as `generate_rationales` does; none without a budget.
    """
    if run.budget is None:
        return []
    kind, draws, shots = run.task.answer, run.config.deploy.draws, short_shots(run, config)
    greedy = rationale_sampling(run, engine, run.config.elicit.rationale_tokens)
    sampling = replace(
        greedy,
        temperature=run.config.tailor.temperature,
        top_p=run.config.elicit.top_p,
        max_tokens=min(greedy.max_tokens, round(run.budget.answer_tokens * _SLACK)),
        seed=run.config.seed + 1,  # as the tailored questions
    )
    found: list[Row] = []
    for first in range(0, draws, _SAMPLES_PER_ROUND):
        have = _short_enough(run, [*rationales, *found])
        lacking = [row for row in questions if row["label"] is not None and row["id"] not in have]
        last = min(first + _SAMPLES_PER_ROUND, draws)
        work = [(row, sample) for row in lacking for sample in range(first, last)]
        requests = [
            Request(rationale_prompt(run, engine, config, row["input"], None, shots), sample)
            for row, sample in work
        ]
        answers = run.calls.complete(engine, requests, sampling, "shorter rationales")
        for (question, _), completion in zip(work, answers, strict=True):
            row = rationale_row(run, question, -1, completion)
            answer = None if row["answer"] is None else comparable(row["answer"], kind)
            row["usable"] = agrees(policy, comparable(question["label"], kind), answer)
            if row["usable"]:
                found.append({**row, "drawn": True})
    return found


def _fits(run: Run) -> Callable[[str], bool]:
    """Return a test whether the student could generate a text in time, counted in its own tokens."""
    assert run.budget is not None
    count, most = run.engine(run.config.student).count_tokens, run.budget.answer_tokens
    return lambda text: count(f" {text.strip()}") <= most


def _short_enough(run: Run, rationales: Sequence[Row]) -> set[str]:
    """Return the questions that have a usable rationale which is short enough."""
    usable = [row for row in rationales if row["usable"]]
    long = {id(row) for row in over_budget(run, usable)}
    return {row["question"] for row in usable if id(row) not in long}

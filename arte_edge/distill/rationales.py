"""Rationales: how the teacher reasons about a question, under a technique's prompt or the naive one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from arte_edge.distill.config import ModelConfig
from arte_edge.distill.grammar import rationale_grammar
from arte_edge.distill.labels import Policy, agrees, decide
from arte_edge.distill.prompts import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    ANSWER_STOPS,
    Worked,
    answer_shots,
    direct_messages,
    rationale_messages,
    teacher_shots,
)
from arte_edge.distill.run import Run
from arte_edge.runtimes.completion import Completion, Engine, Request, Sampling
from arte_edge.tasks.answers import comparable, extract

__all__ = [
    "label_rows",
    "opinions",
    "rationale_prompt",
    "rationale_row",
    "rationale_sampling",
    "write_rationales",
]

Row = dict[str, Any]

_OPINION_GROUP = 16


def rationale_prompt(
    run: Run,
    engine: Engine,
    config: ModelConfig,
    question: str,
    technique: str | None,
    shots: Sequence[Worked] | None = None,
) -> str:
    """Return the rendered prompt; `technique` None is the naive step-by-step prompt, `shots` None the task's."""
    shots = teacher_shots(run.task, config.shots) if shots is None else shots
    return run.render(engine, rationale_messages(run.task, question, technique, shots), "", config)


def write_rationales(
    run: Run,
    engine: Engine,
    config: ModelConfig,
    questions: Sequence[Row],
    techniques: Sequence[str | None],
    tokens: int,
    what: str,
    shots: Sequence[Worked] | None = None,
) -> list[Row]:
    """Write one rationale for each question and technique, greedily.

    Returns rows of question (id), technique (index, -1 for naive), text, answer (None if there is
    no complete answer tag), finish.
    """
    # One technique after another: prompts of one technique share their beginning.
    asked = [(t, technique, row) for t, technique in enumerate(techniques) for row in questions]
    requests = [
        Request(rationale_prompt(run, engine, config, row["input"], technique, shots))
        for _, technique, row in asked
    ]
    sampling = rationale_sampling(run, engine, tokens)
    answers = run.calls.complete(engine, requests, sampling, what)
    return [
        rationale_row(run, row, t if technique is not None else -1, answer)
        for (t, technique, row), answer in zip(asked, answers, strict=True)
    ]


def rationale_sampling(run: Run, engine: Engine, tokens: int) -> Sampling:
    """Return how rationales are decoded: greedily, the end held to the format where that is possible."""
    hold = run.config.elicit.grammar and engine.supports_grammar
    grammar = rationale_grammar(run.task.answer, tokens) if hold else None
    return Sampling(max_tokens=tokens, stop=ANSWER_STOPS, grammar=grammar)


def opinions(
    run: Run, engine: Engine, config: ModelConfig, questions: Sequence[Row], what: str
) -> list[str | None]:
    """Return the teacher's bare few-shot answer to each question, None where the answer set is open.

    A small teacher that is shown many answers often knows better than when it reasons.
    """
    answer, n_shots = run.task.answer, run.config.elicit.opinion_shots
    options = [answer.options(row["input"]) for row in questions]
    if not (answer.closed and n_shots and questions) or run.teacher_is_server:
        return [None] * len(questions)
    shots = answer_shots(run.task.seed, n_shots)
    prompts = [
        run.render(engine, direct_messages(run.task, row["input"], shots), ANSWER_OPEN, config)
        for row in questions
    ]
    choices = [[option + ANSWER_CLOSE for option in row] for row in options]
    found: list[str | None] = []
    # Small groups: when more questions are drafted later, the groups before them are kept.
    for start in range(0, len(prompts), _OPINION_GROUP):
        part = slice(start, start + _OPINION_GROUP)
        scores = run.calls.choose(engine, [prompts[part]], choices[part], what)[0]
        best = np.nanargmax(scores, axis=1)
        found += [row[i] for row, i in zip(options[part], best, strict=True)]
    return found


def rationale_row(run: Run, question: Row, technique: int, completion: Completion) -> Row:
    """Return what is kept of a rationale: see `write_rationales`."""
    return {
        "question": question["id"],
        "technique": technique,
        "text": completion.text.strip(),
        "answer": extract(completion.text, run.task.answer),
        "finish": completion.finish,
        "tokens": completion.completion_tokens,
    }


def label_rows(
    run: Run,
    questions: Sequence[Row],
    rationales: Sequence[Row],
    votes: Sequence[str | None],
    policy: Policy,
) -> Row:
    """Set ``label`` on each question and ``usable`` on each rationale, in place; return what it changed.

    `votes` are the teacher's bare answers (`opinions`); they count like a rationale's.

    The counts are rates in [0, 1]: readable rationales, rationales that agree with the drafted
    target, questions whose label differs from it, questions dropped.
    """
    kind = run.task.answer
    by_question: dict[str, list[Row]] = defaultdict(list)
    for rationale in rationales:
        by_question[rationale["question"]].append(rationale)
    changed = dropped = agreeing = readable = 0
    for question, vote in zip(questions, votes, strict=True):
        mine = by_question[question["id"]]
        target = comparable(question["target"], kind) or ""
        answers = [comparable(r["answer"], kind) if r["answer"] is not None else None for r in mine]
        label = decide(policy, target, [*answers, vote])
        # The label is written as somebody wrote it, not in the form that answers are compared in.
        written = {
            target: question["target"],
            **{a: r["answer"] for a, r in zip(answers, mine, strict=True) if a},
        }
        question["label"] = written.get(label) if label is not None else None
        changed += label is not None and label != target
        dropped += label is None
        for rationale, answer in zip(mine, answers, strict=True):
            rationale["usable"] = agrees(policy, label, answer)
            readable += answer is not None
            agreeing += answer == target
    n, m = max(len(questions), 1), max(len(rationales), 1)
    return {
        "policy": policy,
        "readable": round(readable / m, 4),
        "agree_with_target": round(agreeing / m, 4),
        "label_changed": round(changed / n, 4),
        "questions_dropped": round(dropped / n, 4),
    }

"""The full grid of preference scores: every draft before every question, by one of three ways.

Several drafts travel in one call of the engine, so that its batches stay full; what one draft's
questions share is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from arte_edge.distill.answering import written_each
from arte_edge.distill.prompts import ANSWER_CLOSE, FORCE, Worked, student_messages
from arte_edge.distill.run import Run
from arte_edge.distill.scores import (
    Score,
    probabilities,
    score_answers,
    score_log_probabilities,
    score_open,
)
from arte_edge.runtimes.completion import Engine
from arte_edge.tasks.task import Example

__all__ = ["by_probability", "by_writing", "item_scores"]

Floats = NDArray[np.float64]


def by_probability(
    run: Run, engine: Engine, shots: Sequence[Worked], examples: Sequence[Example]
) -> list[Score]:
    """Score each draft by the probabilities of the given answers: ``likelihood`` and ``forced``."""
    logp, truth = _log_probabilities(run, engine, shots, examples)
    if truth is None:
        return [score_open(one[:, 0]) for one in logp]
    soft = run.config.prefer.score == "likelihood"
    return [score_log_probabilities(one, truth, soft=soft) for one in logp]


def by_writing(run: Run, engine: Engine, shots: Sequence[Worked], examples: Sequence[Example]) -> list[Score]:
    """Score each draft by what the student writes after it: ``accuracy``."""
    targets = [e.target for e in examples]
    tokens = run.most_tokens(run.config.prefer.answer_tokens)
    asks = [(examples, [shot]) for shot in shots]
    found = written_each(run, engine, run.config.student, asks, tokens, "scores")
    return [score_answers(one.answers, targets, one.right.tolist()) for one in found]


def item_scores(run: Run, engine: Engine, shots: Sequence[Worked], examples: Sequence[Example]) -> Floats:
    """Return what each question says of each draft ``[n_draft, n_item]``: the probability of its right answer.

    Without the induced answer bias where the run scores so; for an open answer set log-probabilities (nats).
    """
    logp, truth = _log_probabilities(run, engine, shots, examples)
    if truth is None:
        return np.asarray(logp[:, :, 0])
    free, rows = run.config.prefer.bias_free, np.arange(len(truth))
    return np.array([probabilities(one, free=free)[rows, truth] for one in logp])


def _log_probabilities(
    run: Run, engine: Engine, shots: Sequence[Worked], examples: Sequence[Example]
) -> tuple[Floats, NDArray[np.intp] | None]:
    """Return them ``[n_draft, n_item, n_choice]``, and the right choice of each item where the set is closed."""
    answer, truth = run.task.answer, None
    if answer.closed:
        options = [answer.options(e.input) for e in examples]
        choices = [[option + ANSWER_CLOSE for option in row] for row in options]
        truth = np.array([row.index(e.target) for row, e in zip(options, examples, strict=True)])
    else:
        choices = [[e.target + ANSWER_CLOSE] for e in examples]
    groups = [_prompts(run, engine, shot, examples) for shot in shots]
    return run.calls.choose(engine, groups, choices, "scores"), truth


def _prompts(run: Run, engine: Engine, shot: Worked, examples: Sequence[Example]) -> list[str]:
    student = run.config.student
    return [run.render(engine, student_messages(run.task, e.input, [shot]), FORCE, student) for e in examples]

"""Let a model answer examples and count the right answers, generated or constrained.

*Generated*: the model reasons and must close an answer tag, whose content has to match.
*Constrained*: the prompt opens the answer tag; a closed answer set is compared by log-probability,
an open answer is generated from there. The gap between the two is format, not knowledge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arte_edge.distill.config import ModelConfig
from arte_edge.distill.generation.rationales import rationale_prompt, rationale_sampling
from arte_edge.distill.prompts import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    ANSWER_PREFILL,
    ANSWER_STOPS,
    STEP_BY_STEP,
    Shot,
    student_messages,
)
from arte_edge.distill.run_context import RunContext
from arte_edge.runtimes.completion import Engine, Request, Sampling
from arte_edge.tasks.answers import canonical, extract, matches
from arte_edge.tasks.task import Example

__all__ = ["Predictions", "constrained_answers", "generated_answers"]
__all__ += ["generated_answers_each", "majority_baseline", "teacher_answers"]

_OPEN_ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Predictions:
    """The answers of a model to n examples, its full texts if they were generated, and which are right."""

    answers: list[str | None]
    right: NDArray[np.bool_]  # [n]
    texts: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def generated_answers(
    run: RunContext,
    engine: Engine,
    config: ModelConfig,
    examples: Sequence[Example],
    shots: Sequence[Shot],
    tokens: int,
    what: str,
) -> Predictions:
    """Let the model reason and answer, greedily, after `shots` (paper, section 3.3)."""
    return generated_answers_each(run, engine, config, [(examples, shots)], tokens, what)[0]


def generated_answers_each(
    run: RunContext,
    engine: Engine,
    config: ModelConfig,
    lists: Sequence[tuple[Sequence[Example], Sequence[Shot]]],
    tokens: int,
    what: str,
) -> list[Predictions]:
    """`generated_answers` for several lists of examples, each with its own shots, in the same batches."""
    requests = [
        Request(run.render(engine, student_messages(run.task, example.input, shots), STEP_BY_STEP, config))
        for examples, shots in lists
        for example in examples
    ]
    sampling = Sampling(max_tokens=tokens, stop=ANSWER_STOPS)
    texts = iter(run.calls.complete(engine, requests, sampling, what, together=True))
    return [_judge_texts(run, examples, [next(texts).text for _ in examples]) for examples, _ in lists]


def teacher_answers(run: RunContext, examples: Sequence[Example]) -> Predictions:
    """Let the teacher answer with the prompt with which it generates training data."""
    teacher = run.config.teacher
    engine = run.engine(teacher)
    requests = [Request(rationale_prompt(run, engine, teacher, e.input, None)) for e in examples]
    sampling = rationale_sampling(run, engine, run.config.elicit.rationale_tokens)
    completions = run.calls.complete(engine, requests, sampling, "teacher", budget="elicit.rationale_tokens")
    return _judge_texts(run, examples, [completion.text for completion in completions])


def constrained_answers(
    run: RunContext,
    engine: Engine,
    config: ModelConfig,
    examples: Sequence[Example],
    shots: Sequence[Shot],
    what: str,
) -> Predictions:
    """Open the answer tag for the model and take its likeliest answer; a server writes it."""
    prompts = [
        run.render(engine, student_messages(run.task, example.input, shots), ANSWER_PREFILL, config)
        for example in examples
    ]
    answer = run.task.answer
    if answer.closed and engine.identity.kind != "openai":
        options = [answer.options(example.input) for example in examples]
        choices = [[option + ANSWER_CLOSE for option in row] for row in options]
        scores = run.calls.choose(engine, [prompts], choices, what)[0]
        best = np.nanargmax(scores, axis=1)
        return _judge(run, examples, [row[i] for row, i in zip(options, best, strict=True)])
    sampling = Sampling(max_tokens=_OPEN_ANSWER_TOKENS, stop=(ANSWER_CLOSE, "\n"))
    completions = run.calls.complete(engine, [Request(prompt) for prompt in prompts], sampling, what)
    # A server that does not go on after the opened tag opens its own.
    texts = [c.text.removesuffix(ANSWER_CLOSE).rpartition(ANSWER_OPEN)[2] for c in completions]
    return _judge(run, examples, [canonical(text, answer) for text in texts])


def majority_baseline(run: RunContext, examples: Sequence[Example]) -> float:
    """Return the accuracy of always giving the most frequent answer, or of guessing among the options."""
    top = Counter(example.target for example in examples).most_common(1)[0][1] / len(examples)
    if not run.task.answer.closed:
        return top
    guess = float(np.mean([1 / len(run.task.answer.options(example.input)) for example in examples]))
    return max(top, guess)


def _judge_texts(run: RunContext, examples: Sequence[Example], texts: Sequence[str]) -> Predictions:
    return _judge(run, examples, [extract(text, run.task.answer) for text in texts], texts)


def _judge(
    run: RunContext, examples: Sequence[Example], answers: list[str | None], texts: Sequence[str] = ()
) -> Predictions:
    right = [
        matches(given, example.target, run.task.answer)
        for given, example in zip(answers, examples, strict=True)
    ]
    return Predictions(answers, np.array(right, dtype=np.bool_), tuple(texts))

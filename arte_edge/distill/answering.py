"""Let a model answer examples, and count what is right: by writing, or with the answer forced.

*Written*: the model reasons and must close an answer tag, which then has to match.
*Forced*: the answer tag is opened for it; a closed answer set is compared by
log-probability, an open one is written from there. The gap between the two is format,
not knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arte_edge.distill.config import ModelConfig
from arte_edge.distill.prompts import (
    ANSWER_CLOSE,
    ANSWER_STOPS,
    FORCE,
    STEPS,
    Worked,
    student_messages,
)
from arte_edge.distill.run import Run
from arte_edge.runtimes.completion import Engine, Request, Sampling
from arte_edge.tasks.answers import canonical, extract, matches
from arte_edge.tasks.task import Example

__all__ = ["Answered", "forced", "written", "written_each"]

_OPEN_ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Answered:
    """What a model answered to n examples."""

    answers: list[str | None]
    right: NDArray[np.bool_]  # [n]

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def written(
    run: Run,
    engine: Engine,
    config: ModelConfig,
    examples: Sequence[Example],
    shots: Sequence[Worked],
    tokens: int,
    what: str,
) -> Answered:
    """Let the model reason and answer, greedily, after `shots` (paper, section 3.3)."""
    return written_each(run, engine, config, [(examples, shots)], tokens, what)[0]


def written_each(
    run: Run,
    engine: Engine,
    config: ModelConfig,
    asks: Sequence[tuple[Sequence[Example], Sequence[Worked]]],
    tokens: int,
    what: str,
) -> list[Answered]:
    """`written` for several lists of examples, each after shots of its own, all of them in the same batches."""
    requests = [
        Request(run.render(engine, student_messages(run.task, example.input, shots), STEPS, config))
        for examples, shots in asks
        for example in examples
    ]
    sampling = Sampling(max_tokens=tokens, stop=ANSWER_STOPS)
    texts = iter(run.calls.complete(engine, requests, sampling, what, together=True))
    return [
        _judged(run, examples, [extract(next(texts).text, run.task.answer) for _ in examples])
        for examples, _ in asks
    ]


def forced(
    run: Run,
    engine: Engine,
    config: ModelConfig,
    examples: Sequence[Example],
    shots: Sequence[Worked],
    what: str,
) -> Answered:
    """Open the answer tag for the model and take what it puts there."""
    prompts = [
        run.render(engine, student_messages(run.task, example.input, shots), FORCE, config)
        for example in examples
    ]
    answer = run.task.answer
    if answer.closed:
        options = [answer.options(example.input) for example in examples]
        choices = [[option + ANSWER_CLOSE for option in row] for row in options]
        scores = run.calls.choose(engine, [prompts], choices, what)[0]
        best = np.nanargmax(scores, axis=1)
        return _judged(run, examples, [row[i] for row, i in zip(options, best, strict=True)])
    sampling = Sampling(max_tokens=_OPEN_ANSWER_TOKENS, stop=(ANSWER_CLOSE, "\n"))
    completions = run.calls.complete(engine, [Request(prompt) for prompt in prompts], sampling, what)
    texts = [completion.text.removesuffix(ANSWER_CLOSE) for completion in completions]
    return _judged(run, examples, [canonical(text, answer) for text in texts])


def _judged(run: Run, examples: Sequence[Example], answers: list[str | None]) -> Answered:
    right = [
        matches(given, example.target, run.task.answer)
        for given, example in zip(answers, examples, strict=True)
    ]
    return Answered(answers, np.array(right, dtype=np.bool_))

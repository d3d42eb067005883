"""Score drafts by a race (`race`) in place of the full grid: only what the order of the ends needs.

Three kinds of score are raced alike, by one number a cell: the probability of the right answer, whether it
is the likeliest, or whether the student wrote it. Each round goes through the store call by call, and the
next one follows from what is there, so a killed race goes on to the same scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from arte_edge.distill.answering import written_each
from arte_edge.distill.belief import Floats, believe
from arte_edge.distill.config import Prefer
from arte_edge.distill.length import length_share
from arte_edge.distill.prompts import ANSWER_CLOSE, FORCE, Worked, student_messages
from arte_edge.distill.race import Ask, Race, spread_answers
from arte_edge.distill.run import Run
from arte_edge.distill.scores import Score, answer_bias, probabilities
from arte_edge.runtimes.completion import Engine
from arte_edge.tasks.task import Example

__all__ = ["Raced", "is_raced", "race_scores"]

_WORTH_DRAFTS, _WORTH_ITEMS = 40, 24  # below, a race has too little to learn from and too little to save


@dataclass(frozen=True)
class Raced:
    """Scores ``[d]`` that a race left behind, and what it cost.

    `items` says how many questions each draft was asked, `errors` the standard error of its score
    against the full grid, `open` how many drafts' places were not decided at the stated risk.
    """

    scores: list[Score]
    items: list[int]
    errors: list[float]
    cells: int
    of_cells: int
    open: int
    rounds: int


def is_raced(config: Prefer, n_draft: int, n_item: int) -> bool:
    """Return whether so many drafts and questions are raced under this configuration."""
    large = n_draft >= _WORTH_DRAFTS and n_item >= _WORTH_ITEMS
    return config.race == "on" or (config.race == "auto" and large)


class _Cells(Protocol):
    """The grid of one kind of score: measures some cells of a row, gives them as numbers."""

    def measure(self, asks: Sequence[Ask]) -> None: ...

    def values(self, *, free: bool) -> Floats:
        """Return ``[d, k]``, NaN where nothing was measured; `free` without the induced answer bias."""

    def bias(self, draft: int) -> float: ...

    def accuracy(self, draft: int) -> float: ...


def race_scores(
    run: Run,
    engine: Engine,
    shots: Sequence[Worked],
    question: Sequence[str],
    examples: Sequence[Example],
    tokens: Floats | None = None,
) -> Raced:
    """Race the drafts `shots` over `examples`, the most discriminating first; `question` ``[d]`` groups them.

    With `tokens` ``[d]`` they are raced by what their length does not explain; the scores are those before that.
    """
    config = run.config.prefer
    order = spread_answers([example.target for example in examples])
    examples = [examples[place] for place in order]
    kinds = {key: number for number, key in enumerate(dict.fromkeys(question))}
    rules = Race(tuple(kinds[key] for key in question), len(examples), config.race_share, config.race_error)
    make = _Written if config.score == "accuracy" else _Likely
    grid: _Cells = make(run, engine, shots, examples)
    free = config.bias_free and run.task.answer.closed
    values = np.full((len(shots), len(examples)), np.nan)
    rounds = 0
    while asks := rules.ask(values):
        grid.measure(asks)
        values = grid.values(free=free)
        if tokens is not None:
            values -= length_share(believe(values).mean, tokens)[:, None]
        rounds += 1
    belief, measured = believe(values), np.isfinite(values)
    means = {use: believe(grid.values(free=use)).mean for use in (False, True)}
    scores = [
        Score(float(means[False][d]), float(means[True][d]), grid.bias(d), grid.accuracy(d))
        for d in range(len(shots))
    ]
    return Raced(
        scores,
        [int(n) for n in measured.sum(axis=1)],
        [math.sqrt(variance) for variance in belief.variance],
        int(measured.sum()),
        measured.size,
        int((rules.risk(belief) > rules.error).sum()),
        rounds,
    )


class _Likely:
    """Scores without text: the choices after the opened answer tag, or the right answer alone."""

    def __init__(
        self, run: Run, engine: Engine, shots: Sequence[Worked], examples: Sequence[Example]
    ) -> None:
        self._run, self._engine, self._shots, self._examples = run, engine, shots, examples
        self._closed, answer = run.task.answer.closed, run.task.answer
        options = [answer.options(e.input) if self._closed else [e.target] for e in examples]
        self._choices = [[option + ANSWER_CLOSE for option in row] for row in options]
        self._truth = np.array([row.index(e.target) for row, e in zip(options, examples, strict=True)])
        width = max(len(row) for row in options)
        self._logp = np.full((len(shots), len(examples), width), np.nan)

    def measure(self, asks: Sequence[Ask]) -> None:
        whole = [(self._prompts(ask), [self._choices[item] for item in ask.items]) for ask in asks]
        found = self._run.calls.choose_each(self._engine, whole, "scores")
        for ask, rows in zip(asks, found, strict=True):
            for item, values in zip(ask.items, rows, strict=True):
                self._logp[ask.draft, item, : len(values)] = values

    def _prompts(self, ask: Ask) -> list[str]:
        shot, student = self._shots[ask.draft], self._run.config.student
        messages = [
            student_messages(self._run.task, self._examples[item].input, [shot]) for item in ask.items
        ]
        return [self._run.render(self._engine, message, FORCE, student) for message in messages]

    def values(self, *, free: bool) -> Floats:
        rows = [self._row(row, free) for row in self._logp]
        return np.array(rows)

    def _row(self, logp: Floats, free: bool) -> Floats:
        """Return the cells ``[k]`` of one draft from its log-probabilities ``[k, n_choice]``."""
        out = np.full(len(logp), np.nan)
        seen = np.isfinite(logp).any(axis=1)
        if not self._closed:
            out[seen] = logp[seen, 0]
            return out
        share, truth = probabilities(logp[seen], free=free), self._truth[seen]
        soft = self._run.config.prefer.score == "likelihood"
        hits = np.nanargmax(share, axis=1) == truth
        out[seen] = share[np.arange(len(truth)), truth] if soft else hits
        return out

    def bias(self, draft: int) -> float:
        if not self._closed:
            return 0.0
        seen = np.isfinite(self._logp[draft]).any(axis=1)
        picked = np.nanargmax(self._logp[draft][seen], axis=1)
        return answer_bias(picked.tolist(), self._truth[seen].tolist())

    def accuracy(self, draft: int) -> float:
        if not self._closed:
            return math.nan
        seen = np.isfinite(self._logp[draft]).any(axis=1)
        return float((np.nanargmax(self._logp[draft][seen], axis=1) == self._truth[seen]).mean())


class _Written:
    """The paper's score: the student writes, and its tagged answer must match."""

    def __init__(
        self, run: Run, engine: Engine, shots: Sequence[Worked], examples: Sequence[Example]
    ) -> None:
        self._run, self._engine, self._shots, self._examples = run, engine, shots, examples
        self._right = np.full((len(shots), len(examples)), np.nan)
        self._answers: list[list[str | None]] = [[None] * len(examples) for _ in shots]
        self._targets = [example.target for example in examples]

    def measure(self, asks: Sequence[Ask]) -> None:
        whole = [([self._examples[item] for item in ask.items], [self._shots[ask.draft]]) for ask in asks]
        tokens = self._run.most_tokens(self._run.config.prefer.answer_tokens)
        found = written_each(self._run, self._engine, self._run.config.student, whole, tokens, "scores")
        for ask, one in zip(asks, found, strict=True):
            for item, answer, right in zip(ask.items, one.answers, one.right, strict=True):
                self._right[ask.draft, item], self._answers[ask.draft][item] = right, answer

    def values(self, *, free: bool) -> Floats:
        return self._right * self._weight() if free else self._right.copy()

    def _weight(self) -> Floats:
        """Return ``[k]``: with these weights the mean of a row is balanced accuracy, the mean recall of the answers."""
        kinds = set(self._targets)
        weights = [len(self._targets) / (len(kinds) * self._targets.count(t)) for t in self._targets]
        return np.array(weights)

    def bias(self, draft: int) -> float:
        seen: NDArray[np.intp] = np.flatnonzero(np.isfinite(self._right[draft]))
        given = [answer for item in seen if (answer := self._answers[draft][item]) is not None]
        return answer_bias(given, [self._targets[item] for item in seen]) if given else 0.0

    def accuracy(self, draft: int) -> float:
        return float(np.nanmean(self._right[draft]))

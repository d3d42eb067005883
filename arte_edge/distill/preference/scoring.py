"""Preference scores: how well the student answers the preference set after one draft as its only example.

A grid holds one number for each draft and question: the probability of the right answer
(``likelihood``), whether it is the likeliest (``forced``), or whether the student generated it
(``accuracy``, the paper's). The full grid is one round over all cells; adaptive scoring
(`arte_edge.distill.preference.adaptive`) measures the same cells in several rounds until the ranking is
decided. Calls of several drafts travel together, so that the engine's batches stay full and what the
questions of one draft share is computed once.

After one few-shot example, a small model leans to some answer whatever the question is. On a closed
answer set that bias alone moves accuracy, by as much as the set is imbalanced. So each score comes in
two forms: as measured, and without the induced bias, by subtracting for each answer its mean
log-probability over the preference set (contextual calibration, Zhao et al. 2021, arXiv 2102.09690, with
the set's own questions instead of content-free ones). That is fair because the set holds every answer
equally often.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from numpy.typing import NDArray

from arte_edge.asking.form import ANSWER_CLOSE
from arte_edge.console import doing
from arte_edge.distill.config import Prefer
from arte_edge.distill.preference.adaptive import AdaptivePlan, Cells, Floats, fit_score_model, interleave_answers
from arte_edge.distill.preference.influence import Influence, Question, standard_error
from arte_edge.distill.prompts import ANSWER_PREFILL, Shot, student_messages
from arte_edge.distill.run_context import RunContext
from arte_edge.models.resolve import LocalModel, f16_student, quantized_student
from arte_edge.runtimes.autotune import Candidate, Workload, candidates_here, fastest_engine, may_measure
from arte_edge.runtimes.completion import Engine
from arte_edge.runtimes.loader import is_server, open_local
from arte_edge.store import content_key
from arte_edge.tasks.answers import extract
from arte_edge.tasks.task import Answer, Example

_WORTH_SCORES = 500  # below, opening another engine and the first benchmark take longer than they save
_RUNTIMES = ("llama_cpp_python", "xllamacpp", "torch", "transformers")
_WORTH_DRAFTS, _WORTH_ITEMS = 40, 24  # below, adaptive scoring has too little to learn from and to save
_LEAST_DRAFTS = 12  # below, a slope is mostly chance


@dataclass(frozen=True)
class Score:
    """Scores of one draft over the preference set; `bias` is 0 for unbiased answers, at most 1.

    `value` ranks drafts as measured, `free` without the induced answer bias.
    """

    value: float
    free: float
    bias: float
    accuracy: float


@dataclass(frozen=True)
class Scored:
    """The scores ``[d]`` of all drafts, and what they cost.

    `items` is the number of questions measured for each draft, `errors` the standard error of its score against the
    full grid (of an influence: over the choice of questions), `open` the number of drafts whose rank was not decided at
    the stated risk.
    """

    scores: list[Score]
    items: list[int]
    errors: list[float]
    cells: int
    of_cells: int
    open: int
    rounds: int


def is_adaptive(config: Prefer, n_draft: int, n_item: int) -> bool:
    """Return whether so many drafts and questions are scored adaptively under this configuration.

    `influence` measures a draft on all questions at once.
    """
    if config.score == "influence":
        return False
    large = n_draft >= _WORTH_DRAFTS and n_item >= _WORTH_ITEMS
    return config.race == "on" or (config.race == "auto" and large)


def score_drafts(
    run: RunContext,
    engine: Engine,
    shots: Sequence[Shot],
    question: Sequence[str],
    examples: Sequence[Example],
    *,
    adaptive: bool,
    tokens: Floats | None = None,
) -> Scored:
    """Score the drafts `shots` over `examples`, the most discriminating first; `question` ``[d]`` groups drafts.

    Not `adaptive`, the full grid is measured. With `tokens` ``[d]`` adaptive scoring ranks drafts by what
    their length does not explain; the scores returned are those before that.
    """
    config, plan = run.config.prefer, None
    if config.score == "influence":
        return _by_influence(run, shots, examples)
    if adaptive:
        examples = [examples[place] for place in interleave_answers([e.target for e in examples])]
        plan = AdaptivePlan(tuple(question), len(examples), config.race_share, config.race_error)
    grid: ChoiceScores | GeneratedScores = (
        GeneratedScores.empty(len(shots), examples)
        if config.score == "accuracy"
        else ChoiceScores.empty(len(shots), examples, run.task.answer, soft=config.score == "likelihood")
    )
    free = config.bias_free and run.task.answer.closed
    values = np.full((len(shots), len(examples)), np.nan)
    rounds = 0
    while cells := plan.next_round(values) if plan else _all_cells(values):
        _measure(run, engine, shots, examples, grid, cells)
        values = grid.values(free=free)
        if plan and tokens is not None:
            values -= length_effect(fit_score_model(values).mean, tokens)[:, None]
        rounds += 1
    model = fit_score_model(values) if plan else None
    grids = (grid.values(free=False), grid.values(free=True))
    value, without_bias = (fit_score_model(g).mean if adaptive else g.mean(axis=1) for g in grids)
    measured = np.isfinite(values)
    return Scored(
        [Score(float(value[d]), float(without_bias[d]), grid.bias(d), grid.accuracy(d)) for d in range(len(shots))],
        [int(n) for n in measured.sum(axis=1)],
        [math.sqrt(variance) for variance in model.variance] if model else [0.0] * len(shots),
        int(measured.sum()),
        measured.size,
        int((plan.risk(model) > plan.error).sum()) if plan and model else 0,
        rounds,
    )


def _by_influence(run: RunContext, shots: Sequence[Shot], examples: Sequence[Example]) -> Scored:
    """Score drafts by what training on them does, asked and trained as the student will be (`influence`).

    A score is by how many percent one step at `tune.learning_rate` raises the right answers' (geometric) mean
    probability.
    """
    from arte_edge.distill.evaluation import student_prompts
    from arte_edge.distill.train.common import free_memory

    engine, how, answer = run.engine(run.config.student), run.asking(), run.task.answer
    free = run.config.prefer.bias_free and answer.closed
    closing = how.closing or engine.special_tokens.get("eos_token", "")
    questions = []
    for example, prompt in zip(examples, student_prompts(run, engine, how, examples), strict=True):
        options = answer.options(example.input) if answer.closed else [example.target]
        choices = tuple(option + closing for option in options)
        questions.append(Question(prompt + how.opening, choices, options.index(example.target)))
    drafts = [Example(shot.question, extract(shot.answer, answer) or "") for shot in shots]
    prompts = student_prompts(run, engine, how, drafts)
    completions = [how.completion(d.target, s.answer) for d, s in zip(drafts, shots, strict=True)]
    kept: list[Influence] = []

    def products(i: int) -> list[float]:
        if not kept:  # nothing is loaded where all is stored
            with doing("gradient of the right answers", 2 * len(questions)) as current:

                def progress(n: int) -> None:
                    current.done += n

                kept.append(Influence(run.checkpoint(run.config.student), questions, free=free, progress=progress))
        return [round(float(value), 6) for value in kept[0].of(prompts[i], completions[i])]

    asked = [[q.prompt, list(q.choices), q.right] for q in questions]
    student = [run.local(run.config.student).sha256, content_key(asked), free]
    keys = [content_key("influence", *student, *row) for row in zip(prompts, completions, strict=True)]
    found = np.array(run.calls.values(keys, products, "scores")) * 100 * run.config.tune.learning_rate
    kept.clear()
    free_memory()
    d, k = len(shots), len(examples)
    scores = [Score(value, value, 0.0, math.nan) for value in found.sum(axis=1).tolist()]
    return Scored(scores, [k] * d, [standard_error(found)] * d, d, d, 0, 1)


def _all_cells(values: Floats) -> list[Cells]:
    """Return every cell of the grid as one round; nothing once it is measured."""
    every = tuple(range(values.shape[1]))
    return [] if np.isfinite(values).any() else [Cells(draft, every) for draft in range(len(values))]


def _measure(
    run: RunContext,
    engine: Engine,
    shots: Sequence[Shot],
    examples: Sequence[Example],
    grid: ChoiceScores | GeneratedScores,
    cells: Sequence[Cells],
) -> None:
    """Let the student answer the questions of `cells` after their drafts, and enter the result in `grid`."""
    student = run.config.student
    if isinstance(grid, GeneratedScores):
        from arte_edge.distill.evaluation import reasoned_answers_each

        lists = [([examples[item] for item in one.items], [shots[one.draft]]) for one in cells]
        tokens = run.most_tokens(run.config.prefer.answer_tokens)
        found = reasoned_answers_each(run, engine, lists, tokens, "scores")
        for one, answered in zip(cells, found, strict=True):
            for item, answer, right in zip(one.items, answered.answers, answered.right, strict=True):
                grid.right[one.draft, item], grid.answers[one.draft][item] = right, answer
        return

    def prompt(draft: int, item: int) -> str:
        messages = student_messages(run.task, examples[item].input, [shots[draft]])
        return run.render(engine, messages, ANSWER_PREFILL, student)

    groups = [
        ([prompt(one.draft, item) for item in one.items], [grid.choices[item] for item in one.items]) for one in cells
    ]
    for one, rows in zip(cells, run.calls.choose_each(engine, groups, "scores"), strict=True):
        for item, logp in zip(one.items, rows, strict=True):
            grid.logp[one.draft, item, : len(logp)] = logp


@dataclass
class ChoiceScores:
    """Scores without generation: log-probabilities of the choices after the opened answer tag.

    Args:
        logp: ``[d, k, n_choice]``, NaN where nothing was measured or a question has fewer choices.
        truth: index of the right choice ``[k]``; None for an open answer set, whose only choice is right.
        soft: score the probability of the right choice instead of whether it is the likeliest.
        choices: the texts of each question's choices.
    """

    logp: Floats
    truth: NDArray[np.intp] | None
    soft: bool = True
    choices: Sequence[Sequence[str]] = ()

    @classmethod
    def empty(cls, n_draft: int, examples: Sequence[Example], answer: Answer, *, soft: bool) -> ChoiceScores:
        options = [answer.options(e.input) if answer.closed else [e.target] for e in examples]
        choices = [[option + ANSWER_CLOSE for option in row] for row in options]
        truth = np.array([row.index(e.target) for row, e in zip(options, examples, strict=True)])
        logp = np.full((n_draft, len(examples), max(len(row) for row in options)), np.nan)
        return cls(logp, truth if answer.closed else None, soft, choices)

    def values(self, *, free: bool) -> Floats:
        """Return ``[d, k]``, NaN where nothing was measured; `free` without the induced answer bias."""
        return np.array([self._row(logp, free) for logp in self.logp])

    def _row(self, logp: Floats, free: bool) -> Floats:
        out = np.full(len(logp), np.nan)
        seen = np.isfinite(logp).any(axis=1)
        if self.truth is None:
            out[seen] = logp[seen, 0]
            return out
        share, truth = probabilities(logp[seen], free=free), self.truth[seen]
        likeliest = np.nanargmax(share, axis=1) == truth
        out[seen] = share[np.arange(len(truth)), truth] if self.soft else likeliest
        return out

    def _picked(self, draft: int) -> list[tuple[int, int]]:
        """Return the likeliest choice and the right one of each measured question."""
        seen = np.isfinite(self.logp[draft]).any(axis=1)
        likeliest = np.nanargmax(self.logp[draft][seen], axis=1)
        return [] if self.truth is None else list(zip(likeliest, self.truth[seen], strict=True))

    def bias(self, draft: int) -> float:
        pairs = self._picked(draft)
        return answer_bias([p for p, _ in pairs], [t for _, t in pairs]) if pairs else 0.0

    def accuracy(self, draft: int) -> float:
        pairs = self._picked(draft)
        return sum(p == t for p, t in pairs) / len(pairs) if pairs else math.nan


@dataclass
class GeneratedScores:
    """The paper's score: whether the answer that the student generates matches, ``[d, k]``, NaN if not measured."""

    right: Floats
    answers: list[list[str | None]]
    targets: Sequence[str]

    @classmethod
    def empty(cls, n_draft: int, examples: Sequence[Example]) -> GeneratedScores:
        answers: list[list[str | None]] = [[None] * len(examples) for _ in range(n_draft)]
        return cls(np.full((n_draft, len(examples)), np.nan), answers, [e.target for e in examples])

    def values(self, *, free: bool) -> Floats:
        """Return ``[d, k]``; the mean of a row of `free` is balanced accuracy, the mean recall per answer."""
        if not free:
            return self.right.copy()
        n = len(self.targets)
        counts = Counter(self.targets)
        return np.asarray(self.right * [n / (len(counts) * counts[target]) for target in self.targets])

    def bias(self, draft: int) -> float:
        seen = [int(item) for item in np.flatnonzero(np.isfinite(self.right[draft]))]
        given = [answer for item in seen if (answer := self.answers[draft][item]) is not None]
        return answer_bias(given, [self.targets[item] for item in seen]) if given else 0.0

    def accuracy(self, draft: int) -> float:
        return float(np.nanmean(self.right[draft]))


def probabilities(logp: Floats, *, free: bool) -> Floats:
    """Return the probability of each choice ``[n_item, n_choice]``; `free` without the mean log-probability.

    `logp` are log-probabilities of the choices; NaN where an item has fewer choices.
    """
    if free:
        logp = logp - np.nanmean(logp, axis=0, keepdims=True)
    weight = np.exp(logp - np.nanmax(logp, axis=1, keepdims=True))
    return np.asarray(weight / np.nansum(weight, axis=1, keepdims=True))


def answer_bias(given: Sequence[object], targets: Sequence[object]) -> float:
    """Return the total variation distance between the answers given and the right ones."""
    kinds = {*given, *targets}
    return 0.5 * sum(abs(given.count(k) / len(given) - targets.count(k) / len(targets)) for k in kinds)


def length_effect(score: Floats, tokens: Floats) -> Floats:
    """Return the part ``[d]`` of `score` that a linear fit in log(length) explains; its mean is 0.

    Longer examples score a little higher whatever they contain, and a teacher aligned to such scores gets ever longer
    (Park et al. 2024, arXiv 2403.19159). Zero for few drafts, or drafts of one length.
    """
    length = np.log(np.maximum(tokens, 1.0))
    length = length - length.mean()
    variation = float((length**2).sum())
    if len(score) < _LEAST_DRAFTS or variation < 1e-9:
        return np.zeros(len(score))
    return np.asarray(length * float((length * (score - score.mean())).sum()) / variation)


def scoring_engine(run: RunContext, n_score: int) -> Engine:
    """Return the open engine for `n_score` scores (one draft, one question each): the fastest that runs here.

    Rounding to 16 bits moves single answers, but hardly the ranking (docs/runtimes.md). What is reported of a student
    always comes from its own engine. With `prefer.student_file` the quantized file itself scores.
    """
    config, prefer = run.config.student, run.config.prefer
    if prefer.student_file:
        return run.engine_with(quantized_student(run.local(config), prefer.student_file), None, config)
    pinned = prefer.engine == "student" or prefer.score == "influence"
    if pinned or config.engine != "auto" or is_server(config.model) or n_score < _WORTH_SCORES:
        return run.engine(config)
    # A run that goes on elsewhere, and each of its shards, has to find the scores that were made.
    work: Workload = "write" if prefer.score == "accuracy" else "choose"

    def choose() -> str:
        with doing("comparing engines"):
            return run.where_models_run(_fastest_dtype, run.local(config), config.parallel, work)

    if not (dtype := run.scoring_dtype(choose)):
        return run.engine(config)
    changed = config.model_copy(update={"engine": "transformers"})
    return run.engine_with(run.local(config), None, changed, dtype=dtype)


def _fastest_dtype(model: LocalModel, parallel: int, work: Workload) -> str:
    """Return the floats in which transformers scores fastest here; empty where the student's usual engine does."""
    if not may_measure():
        return ""

    def opening(candidate: Candidate) -> Engine:
        which = f16_student(model) if candidate.kind == "llamacpp" else model
        return open_local(which, kind=candidate.kind, parallel=parallel, dtype=candidate.dtype)

    checkpoint = model.checkpoint()
    weights_bytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    candidates = candidates_here(weights_bytes, has_file=model.gguf is not None, checkpoint=checkpoint)
    facts = [model.sha256, parallel, *map(_version, _RUNTIMES)]
    return fastest_engine(candidates, opening, work, facts).dtype


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

"""Let a model answer examples and count the right answers, as asked or constrained.

*As asked*: a bare input through the chat template that the student is shipped with; the model writes its answer.
*Constrained*: the likeliest answer of a closed set, which needs a grammar on the device. The gap between the two is
format, not knowledge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arte_edge.asking.form import ANSWER_CLOSE, ANSWER_OPEN, Asking
from arte_edge.asking.grammar import gbnf
from arte_edge.distill.config import ModelConfig
from arte_edge.distill.generation.rationales import direct_votes, rationale_prompt, rationale_sampling, votes_directly
from arte_edge.distill.prompts import ANSWER_PREFILL, ANSWER_STOPS, STEP_BY_STEP, Shot, student_messages, teacher_shots
from arte_edge.distill.run_context import RunContext
from arte_edge.runtimes.completion import Engine, Request, Sampling
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.answers import canonical, extract, matches
from arte_edge.tasks.task import Example


@dataclass(frozen=True)
class Predictions:
    """The answers of a model to n examples, its full texts if they were generated, and which are right."""

    answers: list[str | None]
    right: NDArray[np.bool_]  # [n]
    texts: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def student_answers(
    run: RunContext, engine: Engine, how: Asking, examples: Sequence[Example], what: str, shots: Sequence[Shot] = ()
) -> Predictions:
    """Ask a student as its users will: the bare input through its chat template, decoded greedily."""
    sampling = Sampling(max_tokens=how.answer_tokens, stop=how.answer_stops)
    requests = [Request(prompt) for prompt in student_prompts(run, engine, how, examples, shots)]
    done = run.calls.complete(engine, requests, sampling, what, together=True)
    texts = [completion.text for completion in done]
    return _judge(run, examples, [how.read(text) for text in texts], texts)


def student_choices(
    run: RunContext, engine: Engine, how: Asking, examples: Sequence[Example], what: str
) -> Predictions:
    """Take a student's likeliest answer out of a closed set, asked as in `student_answers`.

    An open answer is written after its opened tag, a number or JSON by its grammar where the engine has grammars;
    without either that is `student_answers`.
    """
    answer = run.task.answer
    prompts = [prompt + how.opening for prompt in student_prompts(run, engine, how, examples)]
    if not answer.closed:
        grammar = gbnf(answer, "answer") if engine.supports_grammar else None
        if how.form == "answer" and not grammar:
            return student_answers(run, engine, how, examples, what)
        stops = () if grammar else (ANSWER_CLOSE,)
        sampling = Sampling(max_tokens=how.answer_tokens, stop=stops, grammar=grammar)
        done = run.calls.complete(engine, [Request(prompt) for prompt in prompts], sampling, what)
        texts = [completion.text for completion in done]
        read = (canonical(t, answer) if grammar else extract(ANSWER_OPEN + t, answer) for t in texts)
        return _judge(run, examples, list(read))
    closing = how.closing or engine.special_tokens.get("eos_token", "")
    return _chosen(run, engine, prompts, examples, closing, what)


def student_prompts(
    run: RunContext, engine: Engine, how: Asking, examples: Sequence[Example], shots: Sequence[Shot] = ()
) -> list[str]:
    """Return the prompts that a student's chat template makes of bare inputs."""
    model = run.asked(engine, how)
    return [render(model, how.messages(example.input, shots)) for example in examples]


def teacher_answers(run: RunContext, examples: Sequence[Example]) -> tuple[Predictions, str]:
    """Let the teacher answer as it labels training data; return its answers and how it was asked.

    A closed set is answered directly after many examples, which a small teacher does better than it reasons.
    """
    teacher, engine = run.config.teacher, run.engine(run.config.teacher)
    if votes_directly(run.config, run.task.answer):
        n_shot = min(run.config.elicit.opinion_shots, len(run.task.seed))
        votes = direct_votes(run, engine, [{"input": e.input} for e in examples], "teacher")
        return _judge(run, examples, votes), f"{n_shot}-shot"
    requests = [Request(rationale_prompt(run, engine, e.input, None)) for e in examples]
    sampling = rationale_sampling(run, engine, run.config.elicit.rationale_tokens)
    completions = run.calls.complete(engine, requests, sampling, "teacher", budget="elicit.rationale_tokens")
    texts = [completion.text for completion in completions]
    n_shot = len(teacher_shots(run.task, teacher.shots))
    return _judge(run, examples, [extract(text, run.task.answer) for text in texts], texts), f"{n_shot}-shot"


def respondent_answers(
    run: RunContext, engine: Engine, config: ModelConfig, examples: Sequence[Example], shots: Sequence[Shot], what: str
) -> Predictions:
    """Take the likeliest answer of any model, which is given the task and `shots` in its prompt."""
    prompts = [
        run.render(engine, student_messages(run.task, example.input, shots), ANSWER_PREFILL, config)
        for example in examples
    ]
    answer = run.task.answer
    if answer.closed and engine.identity.kind != "openai":
        return _chosen(run, engine, prompts, examples, ANSWER_CLOSE, what)
    targets = max((engine.count_tokens(e.target) for e in (*run.task.seed, *run.task.validation)), default=8)
    sampling = Sampling(max_tokens=2 * targets + 4, stop=(ANSWER_CLOSE, "\n"))
    completions = run.calls.complete(engine, [Request(prompt) for prompt in prompts], sampling, what)
    # A server that does not go on after the opened tag opens its own.
    texts = [c.text.removesuffix(ANSWER_CLOSE).rpartition(ANSWER_OPEN)[2] for c in completions]
    return _judge(run, examples, [canonical(text, answer) for text in texts])


def _chosen(
    run: RunContext, engine: Engine, prompts: Sequence[str], examples: Sequence[Example], closing: str, what: str
) -> Predictions:
    """Take the likeliest of each example's options after its prompt; `closing` tells C from C++."""
    options = [run.task.answer.options(example.input) for example in examples]
    choices = [[option + closing for option in row] for row in options]
    scores = run.calls.choose(engine, [prompts], choices, what)[0]
    best = np.nanargmax(scores, axis=1)
    return _judge(run, examples, [row[i] for row, i in zip(options, best, strict=True)])


def reasoned_answers_each(
    run: RunContext, engine: Engine, lists: Sequence[tuple[Sequence[Example], Sequence[Shot]]], tokens: int, what: str
) -> list[Predictions]:
    """Let the student reason and answer after each list's own shots (paper, section 3.3), all in the same batches."""
    student = run.config.student
    requests = [
        Request(run.render(engine, student_messages(run.task, example.input, shots), STEP_BY_STEP, student))
        for examples, shots in lists
        for example in examples
    ]
    sampling = Sampling(max_tokens=tokens, stop=ANSWER_STOPS)
    texts = (c.text for c in run.calls.complete(engine, requests, sampling, what, together=True))
    kind = run.task.answer
    return [_judge(run, examples, [extract(next(texts), kind) for _ in examples]) for examples, _ in lists]


def majority_baseline(run: RunContext, examples: Sequence[Example]) -> float:
    """Return the accuracy of always giving the most frequent answer, or of guessing among the options."""
    top = Counter(example.target for example in examples).most_common(1)[0][1] / len(examples)
    if not run.task.answer.closed:
        return top
    guess = float(np.mean([1 / len(run.task.answer.options(example.input)) for example in examples]))
    return max(top, guess)


def _judge(
    run: RunContext, examples: Sequence[Example], answers: list[str | None], texts: Sequence[str] = ()
) -> Predictions:
    right = [matches(given, example.target, run.task.answer) for given, example in zip(answers, examples, strict=True)]
    return Predictions(answers, np.array(right, dtype=np.bool_), tuple(texts))

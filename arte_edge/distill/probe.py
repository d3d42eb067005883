"""A short look at teacher and student: how fast they read and write, and how much.

The same few prompts are sent twice: for one token, which is nearly all reading, and
in full. Lengths of all other prompts are counted with the models' own tokenizers and
cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from arte_edge.distill.plan import Kind, Measured, Shape, Speed, Who
from arte_edge.distill.prompts import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    ANSWER_STOPS,
    FORCE,
    STEPS,
    answer_shots,
    direct_messages,
    question_prefill,
    student_messages,
)
from arte_edge.distill.questions import NearDuplicates, QuestionPlan, parse_questions, question_prompts
from arte_edge.distill.rationales import rationale_prompt, rationale_sampling
from arte_edge.distill.run import Run
from arte_edge.errors import EngineError
from arte_edge.runtimes.completion import Completion, Engine, Request, Sampling
from arte_edge.tasks.answers import canonical
from arte_edge.tasks.task import Example

__all__ = ["measure"]

_CALLS = 2  # real calls of each kind
_LENGTHS = 8  # prompts whose length is counted, for each kind
_LEAST_S = 1e-3  # clocks and caches can make a difference of two times vanish
_FEWEST_DRAFTS = 0.1  # valid drafts a prompt are never taken as less: a run gives up before


def measure(run: Run, kinds: Iterable[Kind]) -> Measured:
    """Ask both models a few real questions.

    Raises:
        EngineError: a model answered none of them.
    """
    teacher, student = run.engine(run.config.teacher), run.engine(run.config.student)
    elicit, evaluate = run.config.elicit, run.config.evaluate
    asking = Sampling(
        temperature=elicit.temperature,
        top_p=elicit.top_p,
        max_tokens=elicit.question_tokens,
        seed=run.config.seed,
    )
    answering = Sampling(max_tokens=evaluate.answer_tokens, stop=ANSWER_STOPS)
    reasoning = rationale_sampling(run, teacher, elicit.rationale_tokens)
    asked = _Timed(teacher, _prompts(run, Kind("teacher", "question"))[:_CALLS], asking)
    reasoned = _Timed(teacher, _prompts(run, Kind("teacher", "rationale"))[:_CALLS], reasoning)
    answered = _Timed(student, _prompts(run, Kind("student", "written"))[:_CALLS], answering)
    written = {
        ("teacher", "question"): asked.mean_written,
        ("teacher", "rationale"): reasoned.mean_written,
        ("student", "written"): answered.mean_written,
    }
    engines: dict[Who, Engine] = {"teacher": teacher, "student": student}
    shapes = {}
    for kind in kinds:
        shape = _shape(run, engines[kind.who], kind)
        if (kind.who, kind.what) in written:
            shape = replace(shape, written=written[kind.who, kind.what])
        shapes[kind] = shape
    speeds: dict[Who, Speed] = {"teacher": _speed([asked, reasoned]), "student": _speed([answered])}
    return Measured(speeds, shapes, _drafts_per_prompt(run, asked.completions))


class _Timed:
    """A batch of real calls with its seconds and tokens."""

    def __init__(self, engine: Engine, prompts: Sequence[str], sampling: Sampling) -> None:
        requests = [Request(prompt, i) for i, prompt in enumerate(prompts)]
        shared, own = _lengths(engine, prompts)
        first_s, _ = _clock(engine, requests, replace(sampling, max_tokens=1, grammar=None))
        all_s, self.completions = _clock(engine, requests, sampling)
        done = [answer for answer in self.completions if answer.finish != "error"]
        if not done:
            raise EngineError(
                f"The probe failed: {self.completions[0].error}", "The same command tries again."
            )
        self.read_tokens, self.read_s = shared + own * len(prompts), max(first_s, _LEAST_S)
        self.written_tokens = sum(answer.completion_tokens for answer in done)
        # An engine keeps what prompts share, so the second time only their own parts are read.
        self.write_s = max(all_s - self.read_s * own * len(prompts) / self.read_tokens, _LEAST_S)
        self.mean_written = self.written_tokens / len(done)


def _clock(engine: Engine, requests: list[Request], sampling: Sampling) -> tuple[float, list[Completion]]:
    began = time.perf_counter()
    answers = engine.complete(requests, sampling)
    return time.perf_counter() - began, answers


def _speed(batches: Sequence[_Timed]) -> Speed:
    return Speed(
        read=sum(b.read_tokens for b in batches) / sum(b.read_s for b in batches),
        write=max(sum(b.written_tokens for b in batches), 1) / sum(b.write_s for b in batches),
    )


def _lengths(engine: Engine, prompts: Sequence[str]) -> tuple[float, float]:
    """Return tokens of what all prompts begin with, and the mean of what is a prompt's own."""
    shared = engine.count_tokens(_common_start(prompts)) if len(prompts) > 1 else 0
    mean = sum(engine.count_tokens(prompt) for prompt in prompts) / len(prompts)
    return float(shared), max(mean - shared, 1.0)


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # whatever these two share, all that sort between them share
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:n]


def _shape(run: Run, engine: Engine, kind: Kind) -> Shape:
    prompts = _prompts(run, kind)
    shared, own = _lengths(engine, prompts)
    answer = run.task.answer
    if kind.what not in ("forced", "opinion"):
        return Shape(shared, own)
    examples = run.task.validation[:_LENGTHS]
    if answer.closed:  # every option is read after the question
        options = [answer.options(example.input) for example in examples]
        tokens = sum(engine.count_tokens(option + ANSWER_CLOSE) for row in options for option in row)
        return Shape(shared, own + tokens / len(examples))
    tokens = sum(engine.count_tokens(example.target + ANSWER_CLOSE) for example in examples)
    return Shape(shared, own, tokens / len(examples))


def _prompts(run: Run, kind: Kind) -> list[str]:
    """Return a few real prompts of a kind; the questions in them are validation examples."""
    config = run.config.teacher if kind.who == "teacher" else run.config.student
    engine, task = run.engine(config), run.task
    examples = task.validation[:_LENGTHS]
    if kind.what == "question":
        return [r.prompt for r in question_prompts(run, engine, config, _question_plan(run), 0, _LENGTHS)]
    if kind.what == "rationale":
        return [rationale_prompt(run, engine, config, example.input, None) for example in examples]
    shots = answer_shots(task.seed, kind.shots)
    if kind.what == "opinion":
        return [
            run.render(engine, direct_messages(task, e.input, shots), ANSWER_OPEN, config) for e in examples
        ]
    opening = STEPS if kind.what == "written" else FORCE
    return [run.render(engine, student_messages(task, e.input, shots), opening, config) for e in examples]


def _question_plan(run: Run) -> QuestionPlan:
    elicit = run.config.elicit
    return QuestionPlan(
        wanted=elicit.questions,
        shown=elicit.shown,
        asked=elicit.asked,
        temperature=elicit.temperature,
        top_p=elicit.top_p,
        tokens=elicit.question_tokens,
        rouge=elicit.rouge,
        max_prompts=elicit.max_prompts,
        seed=run.config.seed,
        one_draw=elicit.one_draw,
    )


def _drafts_per_prompt(run: Run, answers: Sequence[Completion]) -> float:
    elicit, task = run.config.elicit, run.task
    known: tuple[Example, ...] = (*task.seed, *task.validation)
    near = NearDuplicates(elicit.rouge, (example.input for example in known))
    opening = question_prefill(min(elicit.shown, len(task.seed)))
    n_valid = 0
    for answer in answers:
        for draft in parse_questions(opening + answer.text):
            if isinstance(draft, str) or canonical(draft[1], task.answer) is None or near.find(draft[0]):
                continue
            near.add(draft[0])
            n_valid += 1
    return max(n_valid / len(answers), _FEWEST_DRAFTS)

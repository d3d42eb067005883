"""How much work a run is: calls, tokens, minutes and cost of every stage, from settings and measured rates.

Pure arithmetic, without a model. Counts follow the stages' own rules; where a stage
decides on the way (drafts refused, labels dropped, ties), the plan takes the case in
which nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

from arte_edge.distill.config import RunConfig
from arte_edge.runtimes.openai.client import Prices

__all__ = ["Kind", "Measured", "Shape", "Sizes", "Speed", "StagePlan", "Work", "plan", "works"]

Who = Literal["teacher", "student"]
What = Literal["question", "rationale", "opinion", "written", "forced"]

_GROUP = 32  # calls that are sent together, and share the reading of a common beginning
_FIRST_ROUND = 4  # prompts for questions that are sent at the least

# A rule of thumb, measured once on two CPU cores with other work on them: DPO of a 0.5B teacher with
# LoRA took 150 s for 12 pairs, SFT of all weights of a 135M student half a second an example. Time
# grows with the number of weights. The lengths of texts and the speed of a machine are not in it.
_DPO_S_PER_PAIR, _DPO_PARAMETERS = 150 / 12, 494e6
_SFT_S_PER_EXAMPLE, _SFT_PARAMETERS = 0.5, 134.5e6


@dataclass(frozen=True)
class Kind:
    """What is asked of whom, after how many worked examples."""

    who: Who
    what: What
    shots: int = 0


@dataclass(frozen=True)
class Shape:
    """The tokens of one kind of call: prompt tokens that calls share, a call's own, and tokens written."""

    shared: float
    own: float
    written: float = 0.0


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one model, several calls together: reading prompts, writing text."""

    read: float
    write: float


@dataclass(frozen=True)
class Sizes:
    """What the counts depend on beside the settings."""

    n_validation: int
    n_test: int
    n_techniques: int
    closed: bool  # answers come from a closed set
    server: bool  # the teacher is behind a server
    teacher_parameters: int
    student_parameters: int


@dataclass(frozen=True)
class Measured:
    """What a probe found out about the two models."""

    speeds: Mapping[Who, Speed]
    shapes: Mapping[Kind, Shape]
    drafts_per_prompt: float  # valid questions from one prompt


@dataclass(frozen=True)
class Work:
    """`calls` of one kind in one stage; a common beginning is read `groups` times."""

    stage: str
    kind: Kind
    calls: int
    groups: int


@dataclass
class StagePlan:
    """One line of the table. `training_minutes` is rough; `cost_usd` is the teacher's, behind a server."""

    stage: str
    calls: int = 0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    engine_minutes: float = 0.0
    training_minutes: float = 0.0
    cost_usd: float = 0.0

    @property
    def minutes(self) -> float:
        return self.engine_minutes + self.training_minutes


def plan(
    config: RunConfig, sizes: Sizes, measured: Measured, prices: Prices | None = None
) -> list[StagePlan]:
    """Return a line for each stage of the run, in order. With `data = "original-teacher"` four fall away."""
    lines: dict[str, StagePlan] = {}
    for work in works(config, sizes, measured.drafts_per_prompt):
        line = lines.setdefault(work.stage, StagePlan(work.stage))
        shape, speed = measured.shapes[work.kind], measured.speeds[work.kind.who]
        prompt, written = work.calls * (shape.shared + shape.own), work.calls * shape.written
        read = work.groups * shape.shared + work.calls * shape.own
        line.calls += work.calls
        line.prompt_tokens += prompt
        line.completion_tokens += written
        line.engine_minutes += (read / speed.read + written / speed.write) / 60
        if prices and sizes.server and work.kind.who == "teacher":
            line.cost_usd += prices.cost_usd(round(prompt), round(written))
    for stage, minutes in _training(config, sizes).items():
        lines.setdefault(stage, StagePlan(stage)).training_minutes = minutes
    order = ("check", "elicit", "calibrate", "prefer", "align", "tailor", "tune", "evaluate")
    return [lines[stage] for stage in order if stage in lines]


def works(config: RunConfig, sizes: Sizes, drafts_per_prompt: float) -> Iterator[Work]:
    """Yield what each stage asks of the models."""
    yield from _check(config, sizes)
    if config.aligned:
        yield from _drafts(
            "elicit", config, sizes, config.elicit.questions, sizes.n_techniques, drafts_per_prompt
        )
        yield from _calibrate(config, sizes)
        yield _prefer(config, sizes)
        yield _probes(config)
    yield from _drafts("tailor", config, sizes, config.tailor.questions, 1, drafts_per_prompt)
    yield from _evaluate(config, sizes)


def _work(stage: str, kind: Kind, calls: int) -> Work:
    return Work(stage, kind, calls, ceil(calls / _GROUP))


def _check(config: RunConfig, sizes: Sizes) -> Iterator[Work]:
    n = min(config.check.examples, sizes.n_validation)
    yield _work("check", Kind("teacher", "rationale"), n)
    yield _work("check", Kind("student", "written"), n)
    yield _work("check", Kind("student", "forced"), n)


def _drafts(
    stage: str, config: RunConfig, sizes: Sizes, questions: int, rationales: int, drafts_per_prompt: float
) -> Iterator[Work]:
    prompts = max(_FIRST_ROUND, ceil(questions / drafts_per_prompt))
    yield _work(stage, Kind("teacher", "question"), prompts)
    yield _work(stage, Kind("teacher", "rationale"), questions * rationales)
    if sizes.closed and config.elicit.opinion_shots and not sizes.server:
        yield _work(stage, Kind("teacher", "opinion", config.elicit.opinion_shots), questions)


def _calibrate(config: RunConfig, sizes: Sizes) -> Iterator[Work]:
    items = min(config.calibrate.items, sizes.n_validation)
    # Further models are not opened for a plan; they count as being like the teacher.
    respondents: list[Who] = ["student", "teacher"]
    respondents += ["teacher"] * len(config.calibrate.models)
    for who in respondents:
        for shots in config.calibrate.shots:
            yield _work("calibrate", Kind(who, "forced", shots), items)


def _prefer(config: RunConfig, sizes: Sizes) -> Work:
    rationales = config.elicit.questions * sizes.n_techniques
    k = min(config.calibrate.k, config.calibrate.items, sizes.n_validation)
    what: What = "written" if config.prefer.score == "accuracy" else "forced"
    # Each rationale is another beginning, which its k questions share.
    return Work("prefer", Kind("student", what, 1), rationales * k, rationales * ceil(k / _GROUP))


def _pairs(config: RunConfig) -> int:
    return config.wanted_question_pairs + min(config.wanted_rationale_pairs, config.elicit.questions)


def _probes(config: RunConfig) -> Work:
    steps = ceil(_pairs(config) / config.align.batch_size * config.align.epochs)
    looks = 1 + ceil(steps / config.align.probe_every)  # before the first step, now and then, after the last
    return _work("align", Kind("teacher", "question"), looks * config.align.probe_prompts)


def _evaluate(config: RunConfig, sizes: Sizes) -> Iterator[Work]:
    n = min(config.evaluate.limit or sizes.n_test, sizes.n_test)
    for shots in config.evaluate.shots:
        yield _work("evaluate", Kind("student", "written", shots), 2 * n)  # before and after
    yield _work("evaluate", Kind("student", "forced"), 2 * n)
    if config.evaluate.teacher:
        yield _work("evaluate", Kind("teacher", "rationale"), n)


def _training(config: RunConfig, sizes: Sizes) -> dict[str, float]:
    """Return rough minutes of the two trainings."""
    examples = config.tailor.questions * config.tune.epochs
    minutes = {
        "tune": examples * _SFT_S_PER_EXAMPLE * sizes.student_parameters / _SFT_PARAMETERS / 60,
    }
    if config.aligned:
        pairs = _pairs(config) * config.align.epochs
        minutes["align"] = pairs * _DPO_S_PER_PAIR * sizes.teacher_parameters / _DPO_PARAMETERS / 60
    return minutes

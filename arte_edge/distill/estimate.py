"""``arte-edge distill --dry-run``: calls, tokens and cost of every stage, before they are spent.

A teacher behind a server answers a few real prompts of each kind, which gives the length of what it generates; a
model on this machine would take minutes for that, so its answers count with their limits. The lengths of all prompts
come from the models' own tokenizers, the rest from the stages' own rules. Where a stage decides as it goes, no draft is
dropped and adaptive scoring measures all that it may. The run folder is neither read nor written.

With GPUs (`gpu_plan`) a checkpoint is not loaded at all, so that a run of 70B parameters is planned on a laptop, and
the table has hours, memory and money.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from arte_edge.asking.form import ANSWER_CLOSE, ANSWER_OPEN, FORMS, Form
from arte_edge.console import Reporter, emit_json, out
from arte_edge.distill.cached_calls import GROUP
from arte_edge.distill.config import TECHNIQUE_ARMS, ModelConfig, RunConfig
from arte_edge.distill.evaluation import student_prompts
from arte_edge.distill.generation.inputs import Focus
from arte_edge.distill.generation.questions import QuestionPlan, draft_sampling, valid_drafts
from arte_edge.distill.generation.rationales import rationale_prompt, rationale_sampling, votes_directly
from arte_edge.distill.gpu_plan import (
    GpuPlan,
    Gpus,
    Placement,
    Shape,
    TokenizerOnly,
    Training,
    call_hours,
    place,
    takes_no_weights,
    training,
)
from arte_edge.distill.memory_plan import Tokens, memory_plan, models_of
from arte_edge.distill.preference.adaptive import AdaptivePlan
from arte_edge.distill.preference.scoring import is_adaptive
from arte_edge.distill.prompts import (
    ANSWER_PREFILL,
    STEP_BY_STEP,
    Shot,
    answer_shots,
    direct_messages,
    student_messages,
)
from arte_edge.distill.run_context import RunContext, tells_labels
from arte_edge.distill.stages.align import dpo_settings
from arte_edge.distill.stages.calibrate import respondents
from arte_edge.distill.stages.elicit import draft_plan, draft_source
from arte_edge.distill.stages.fresh_drafts import SCORED
from arte_edge.distill.stages.tailor import tailor_plan
from arte_edge.distill.stages.target import FEWEST_REASONS, TRIAL_EXAMPLES, TRIAL_ROWS
from arte_edge.distill.train.common import examples_seen
from arte_edge.distill.train.dpo import least_epochs
from arte_edge.distill.validate_config import refuse_run
from arte_edge.errors import EngineError, InputError
from arte_edge.extras import need
from arte_edge.runtimes.completion import Completion, Engine, Request, Sampling
from arte_edge.runtimes.loader import is_server
from arte_edge.runtimes.openai.client import Prices
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Task

Who = Literal["teacher", "student"]
# asked, chosen: as the tuned student is asked; generated, constrained: after few-shot examples in the prompt
What = Literal["question", "rationale", "vote", "asked", "chosen", "generated", "constrained"]

_WHO: tuple[Who, ...] = ("teacher", "student")
_PROBE_CALLS = 2  # real calls of each kind
_PROBE_PROMPTS = 8  # prompts of each kind whose length is counted
_FEWEST_DRAFTS = 0.1  # assumed lower bound of valid drafts per prompt: a run gives up before
_ORDER = ("check", "target", "elicit", "calibrate", "prefer", "align", "tailor", "tune", "evaluate")


@dataclass(frozen=True)
class Call:
    """One kind of call: which model does what, with how many few-shot examples."""

    who: Who
    what: What
    shots: int = 0


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of one kind of call."""

    prompt: float
    completion: float = 0.0


@dataclass(frozen=True)
class Work:
    """The `n` calls of one kind in one stage."""

    stage: str
    call: Call
    n: int


@dataclass
class StageEstimate:
    """One line of the table. `cost_usd` is the teacher's, behind a server."""

    stage: str
    calls: int = 0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    cost_usd: float = 0.0


def dry_run(
    config: RunConfig, *, prices: Prices | None = None, gpus: Gpus | None = None, as_json: bool = False
) -> None:
    """Print the estimate of a run on stdout, one line per stage; with `gpus` its hours and memory on them.

    Raises:
        InputError: a task or model that cannot be used, or prices for a local teacher.
        EngineError: a model does not answer.
    """
    need("train", "a dry run")
    task = load_task(config.task.ref, bbh=Path(config.task.bbh) if config.task.bbh else None)
    bare = {who: gpus and takes_no_weights(_model(config, who).model) for who in _WHO}
    refuse_run(config, task, models=not any(bare.values()))
    if prices and not config.teacher.on_server:
        raise InputError(f"--prices: {config.teacher.model} runs locally and costs nothing")
    with TemporaryDirectory(prefix="arte-edge-") as folder:
        run, shapes = RunContext(config, task, Path(folder), Reporter(quiet=as_json)), dict[Who, Shape]()
        run.as_given = True
        try:
            for who in _WHO:
                model = _model(config, who)
                if bare[who]:
                    shapes[who] = Shape.of(model.model)
                elif gpus and not is_server(model.model):
                    shapes[who] = Shape.of_file(run.local(model))
                served = is_server(model.model) or (who == "teacher" and config.teacher.addresses)
                # Reading weights takes seconds, a start of vLLM minutes; llama.cpp only maps its file.
                if bare[who] or not (served or run.on_llamacpp(model)):
                    run.lend(model, TokenizerOnly(model.model if bare[who] else str(run.checkpoint(model))))
            run.reporter.say("Counting the tokens of a few prompts of each kind …")
            calls = {work.call for work in stage_work(config, task, 1.0)}
            lengths, drafts_per_prompt = probe(run, calls)
            models = None if gpus else models_of(run)
        finally:
            run.close()
    lines = estimate(config, task, lengths, drafts_per_prompt, prices)
    rows = _rows(lines, priced=prices is not None)
    notes = _notes(config, drafts_per_prompt, prices)
    longest = {who: _longest(lengths, who) for who in _WHO}
    memory = memory_plan(config, replace(Tokens.most(config, task), **longest), models) if models else None
    notes += [f"Memory: {memory}."] if memory else []
    plan = plan_gpus(config, task, lengths, drafts_per_prompt, shapes, gpus) if gpus else None
    if plan:
        notes += plan.notes
        for row in rows:
            row |= {"hours": round(plan.hours_of(row["stage"]), 3), "gpu_usd": plan.usd_of(row["stage"])}
    if as_json:
        stages = {"stages": rows[:-1], "total": rows[-1]}
        more = {key: each.as_row() for key, each in (("gpus", plan), ("memory", memory)) if each}
        emit_json({"event": "plan", **stages, **more, "drafts_per_prompt": drafts_per_prompt, "notes": notes})
        return
    _print_table(rows, priced=prices is not None)
    if plan:
        plan.print()
    for note in notes:
        out.print(note, markup=False, soft_wrap=True)


def _model(config: RunConfig, who: Who) -> ModelConfig:
    return config.teacher if who == "teacher" else config.student


def parse_prices(text: str) -> Prices:
    """Read ``0.15,0.60``: dollars per million prompt tokens and per million completion tokens.

    Raises InputError: not two numbers of 0 or more.
    """
    try:
        prompt, completion = (float(part) for part in text.split(","))
    except ValueError:
        prompt = completion = -1.0
    if not (0 <= prompt < float("inf") and 0 <= completion < float("inf")):
        raise InputError(f"--prices {text}: not two prices", "Dollars per million tokens: --prices 0.15,0.60")
    return Prices(prompt, completion)


def estimate(
    config: RunConfig,
    task: Task,
    lengths: Mapping[Call, Lengths],
    drafts_per_prompt: float,
    prices: Prices | None = None,
) -> list[StageEstimate]:
    """Return a line for each stage of the run, in order; without alignment four stages are left out."""
    lines = {"tune": StageEstimate("tune")}
    for work in stage_work(config, task, drafts_per_prompt):
        line = lines.setdefault(work.stage, StageEstimate(work.stage))
        prompt = work.n * lengths[work.call].prompt
        completion = work.n * lengths[work.call].completion
        line.calls += work.n
        line.prompt_tokens += prompt
        line.completion_tokens += completion
        if prices and work.call.who == "teacher" and config.teacher.on_server:
            line.cost_usd += prices.cost_usd(round(prompt), round(completion))
    return [lines[stage] for stage in _ORDER if stage in lines]


def stage_work(config: RunConfig, task: Task, drafts_per_prompt: float) -> Iterator[Work]:
    """Yield the calls of each stage."""
    n_check, own = min(config.check.examples, len(task.validation)), config.check.own_labels and task.seed
    votes, by_label = votes_directly(config, task.answer), tells_labels(config, task)
    labels = Call("teacher", "vote", config.elicit.opinion_shots) if votes else Call("teacher", "rationale")
    chosen = Call("student", "chosen")
    yield Work("check", labels, n_check)
    yield Work("check", Call("student", "asked"), (2 if own else 1) * n_check)
    yield Work("check", chosen, n_check if task.answer.closed else 0)
    if config.tune.target == "auto":
        n_held_out, n_row = min(TRIAL_EXAMPLES, len(task.validation)), min(TRIAL_ROWS, len(task.seed))
        n_form = len(FORMS) if n_row >= FEWEST_REASONS or not by_label else 1
        # On all seed rows the student of the answer alone is the check's, and has answered there.
        known = min(n_check, n_held_out) if by_label and own and n_row == len(task.seed) else 0
        if by_label:
            yield Work("target", Call("teacher", "rationale"), n_row)
        yield Work("target" if by_label else "tune", Call("student", "asked"), n_form * n_held_out - known)
    if config.aligned:
        yield from _drafts("elicit", config, task, draft_plan(config), len(task.techniques), drafts_per_prompt)
        yield from _calibrate(config, task)
        yield from _prefer("prefer", config, task, config.elicit.questions, len(task.techniques))
        each = min(config.align.pairs_per_question, len(task.techniques) // 2)
        n_pair = config.n_question_pairs + min(config.n_rationale_pairs, each * config.elicit.questions)
        settings = dpo_settings(config)
        per_step = settings.batch_size * settings.accumulate
        n_step = ceil(examples_seen(n_pair, least_epochs(settings, n_pair)) / per_step)
        # Checks before the first step, regularly, and after the last.
        n_look = 1 + ceil(n_step / settings.probe_every)
        yield Work("align", Call("teacher", "question"), n_look * config.align.probe_prompts)
        yield from _fresh_drafts(config, task)
    elif config.data == "best-of-n":
        yield from _calibrate(config, task)
    plan = tailor_plan(config, task, reasons=not _bare(config, task))
    n_rationale = len(task.techniques) if config.data in TECHNIQUE_ARMS else config.best_of
    for _ in range(config.rounds):
        yield from _drafts("tailor", config, task, plan, n_rationale, drafts_per_prompt)
        if config.data in ("best-of-n", "preferred-rationale"):
            yield from _prefer("tailor", config, task, plan.needed, n_rationale)
    if config.rounds > 1:
        yield Work("tune", Call("student", "asked"), config.rounds * len(task.validation))
    n_test = len(task.test_keys())
    n_test = min(config.evaluate.limit or n_test, n_test)
    for shots in config.evaluate.shots:
        yield Work("evaluate", Call("student", "asked", shots), 2 * n_test)  # base and tuned
    yield Work("evaluate", Call("student", "asked"), 2 * n_test if own else 0)
    # Without tags a constrained open answer is one as asked.
    asked_already = not task.answer.closed and _form(config) == "answer" and 0 in config.evaluate.shots
    yield Work("evaluate", chosen, 0 if asked_already else 2 * n_test)
    if config.evaluate.teacher:
        yield Work("evaluate", labels, n_test)


def plan_gpus(
    config: RunConfig,
    task: Task,
    lengths: Mapping[Call, Lengths],
    drafts_per_prompt: float,
    shapes: Mapping[Who, Shape],
    gpus: Gpus,
) -> GpuPlan:
    """Return the hours of each stage on `gpus`; a model behind a server, without a shape, takes none of them.

    Each address of ``teacher.server`` is one replica of the teacher, which holds its GPUs during the whole run.

    Raises InputError: a model does not fit into all of them, or the servers leave none.
    """
    placed = dict[str, Placement]()
    rest = gpus
    for who in sorted(shapes, reverse=True):  # the teacher first
        shape = shapes[who]
        longest = _longest(lengths, who)
        spot = place(shape, rest, _model(config, who).parallel, longest)
        if who == "teacher" and config.teacher.addresses:
            held = spot.gpus_each * len(config.teacher.addresses)
            if held >= gpus.n:
                raise InputError(
                    f"teacher.server: {len(config.teacher.addresses)} × {spot.gpus_each} GPUs leave none of {gpus.n} "
                    "for the student and the trainings",
                    "Plan with more GPUs, or fewer servers.",
                )
            spot = place(shape, replace(gpus, n=held), config.teacher.parallel, longest)
            rest = replace(gpus, n=gpus.n - held)
        placed[who] = spot
    hours: dict[str, float] = {}
    for work in stage_work(config, task, drafts_per_prompt):
        if one := placed.get(work.call.who):
            each = lengths[work.call]
            hours.setdefault(work.stage, 0.0)
            hours[work.stage] += call_hours(one, work.n * each.prompt, work.n * each.completion)
    trainings = [*_alignment(config, task, lengths, shapes, rest), _tuning(config, task, lengths, shapes, rest)]
    notes = [
        "Hours: vLLM's measured shares of the GPU's peak, prefixes computed each time, stages one after the other; "
        "docs/cluster.md says how far off they are. Loading models and the students of own labels are not in them."
    ]
    notes += [
        f"{each.stage}: {each.memory_gb:.0f} GB do not fit into {gpus.room_gb:g} of a GPU's "
        f"{gpus.facts.memory_gb:g} GB: "
        + (
            "with addresses in teacher.server the checks need no copy of the teacher here, then train.shard_teacher = "
            "true spreads its weights over train.processes; data = 'best-of-n' aligns none."
            if each.stage == "align"
            else "lower the batch size, or run this stage on larger GPUs (--until, --from)."
        )
        for each in trainings
        if each.memory_gb > gpus.room_gb
    ]
    if rest.n < gpus.n:
        notes.append(
            f"The teacher's servers hold {gpus.n - rest.n} of {gpus.n} GPUs during the whole run; the student and the "
            f"trainings have the other {rest.n}."
        )
    if config.train.processes < rest.n:
        notes.append(
            f"Trainings use {config.train.processes} of {rest.n} GPUs: train.processes = {rest.n} shares each step."
        )
    return GpuPlan(gpus, hours, placed, trainings, notes)


def _longest(lengths: Mapping[Call, Lengths], who: Who) -> int:
    return ceil(max(found.prompt + found.completion for call, found in lengths.items() if call.who == who))


def _alignment(
    config: RunConfig, task: Task, lengths: Mapping[Call, Lengths], shapes: Mapping[Who, Shape], gpus: Gpus
) -> Iterator[Training]:
    """Yield the alignment, if there is one here: DPO with LoRA on both sides of each pair."""
    if not config.aligned or "teacher" not in shapes:
        return
    settings, kinds = dpo_settings(config), {"question": config.n_question_pairs}
    if not _bare(config, task):
        kinds["rationale"] = config.n_rationale_pairs
    n_pair = sum(kinds.values())
    sides = {kind: lengths[Call("teacher", kind)] for kind in kinds}  # type: ignore[arg-type]
    tokens = {kind: 2 * (side.prompt + side.completion) for kind, side in sides.items()}
    mean = sum(tokens[kind] * n for kind, n in kinds.items()) / max(n_pair, 1)
    yield training(
        "align",
        shapes["teacher"],
        gpus,
        min(config.train.processes, gpus.n),
        tokens=mean * examples_seen(n_pair, least_epochs(settings, n_pair)),
        at_once=max(tokens.values()) * settings.batch_size,
        lora_rank=config.align.lora_rank,
        reference=True,
        spread=config.train.shard_teacher and min(config.train.processes, gpus.n) > 1,
        probed=not config.teacher.addresses,
        four_bits=config.align.weights == "nf4",
    )


def _tuning(
    config: RunConfig, task: Task, lengths: Mapping[Call, Lengths], shapes: Mapping[Who, Shape], gpus: Gpus
) -> Training:
    """Return the tuning of the student, of all rounds; each trains on the rows of those before too."""
    n = min(config.train.processes, gpus.n)
    own = len(task.seed) if config.tune.own_labels and _form(config) != "reasoning-first" else 0
    rows = sum(number * config.tailor.questions + own for number in range(1, config.rounds + 1))
    each = lengths[Call("student", "asked")]
    return training(
        "tune",
        shapes["student"],
        gpus,
        n,
        tokens=(each.prompt + each.completion) * examples_seen(rows, config.tune.epochs),
        at_once=(each.prompt + each.completion) * max(config.tune.batch_size // n, 1),
        lora_rank=config.tune.lora_rank if config.tune.method == "lora" else None,
    )


def _drafts(
    stage: str, config: RunConfig, task: Task, plan: QuestionPlan, n_technique: int, drafts_per_prompt: float
) -> Iterator[Work]:
    sent = valid = 0
    while valid < plan.needed and (n := plan.next_prompts(valid, sent, GROUP)) > 0:
        sent += n
        valid = min(int(sent * drafts_per_prompt), plan.needed)
    yield Work(stage, Call("teacher", "question"), sent)
    if not _bare(config, task):
        yield Work(stage, Call("teacher", "rationale"), plan.needed * n_technique)
    policy = config.elicit.label if stage == "elicit" else config.tailor.label
    kept = _bare(config, task) and policy == "teacher"  # no vote on them
    if votes_directly(config, task.answer) and not kept:
        yield Work(stage, Call("teacher", "vote", config.elicit.opinion_shots), plan.needed)


def _calibrate(config: RunConfig, task: Task) -> Iterator[Work]:
    n_item = min(config.calibrate.items, len(task.validation))
    for model in respondents(config, closed=task.answer.closed):
        # Further models are not opened for an estimate; they count like the teacher.
        who: Who = "student" if model is config.student else "teacher"
        for shots in config.calibrate.shots:
            yield Work("calibrate", Call(who, "constrained", shots), n_item)


def _bare(config: RunConfig, task: Task) -> bool:
    """Return whether the teacher writes no rationales; an automatic form counts as the answer alone."""
    return tells_labels(config, task) and config.tune.target in ("auto", "answer")


def _prefer(stage: str, config: RunConfig, task: Task, n_question: int, n_rationale: int) -> Iterator[Work]:
    """Yield the scores of so many drafts: of each question, so many rationales, or its answer alone."""
    n_each = 1 if _bare(config, task) else n_rationale
    yield _scores(stage, config, task, [q for q in range(n_question) for _ in range(n_each)])


def _scores(stage: str, config: RunConfig, task: Task, question: Sequence[int], *, may_adapt: bool = True) -> Work:
    """Return the scores of drafts, `question` ``[n_draft]`` saying whose each is; at most so many."""
    k = min(config.calibrate.k, config.calibrate.items, len(task.validation))
    if config.prefer.score == "influence":  # a backward pass counts as one call
        return Work(stage, Call("student", "asked"), len(question) + k)
    adaptive = may_adapt and is_adaptive(config.prefer, len(question), k)
    plan = AdaptivePlan(tuple(question), k, config.prefer.race_share, config.prefer.race_error)
    what: What = "generated" if config.prefer.score == "accuracy" else "constrained"
    return Work(stage, Call("student", what, 1), plan.most if adaptive else len(question) * k)


def _fresh_drafts(config: RunConfig, task: Task) -> Iterator[Work]:
    """Yield the drafts of both teachers after the alignment, and their scores, at most."""
    n, k = config.align.fresh_drafts, min(config.calibrate.k, config.calibrate.items, len(task.validation))
    bare = _bare(config, task)
    if config.n_question_pairs or bare:
        yield Work("align", Call("teacher", "question"), 2 * n)
    if config.n_rationale_pairs and not bare:
        n = min(n, len(task.validation) - k)
        yield Work("align", Call("teacher", "rationale"), 2 * n)
    elif not bare:
        return
    yield _scores("align", config, task, range(2 * n * (SCORED if bare else 1)), may_adapt=False)


def probe(run: RunContext, calls: Iterable[Call]) -> tuple[dict[Call, Lengths], float]:
    """Return the mean lengths of each kind of call, and the valid drafts per prompt, from a few real calls.

    Raises EngineError: a model answered none of them.
    """
    teacher, student = run.engine(run.config.teacher), run.engine(run.config.student)
    elicit, plan = run.config.elicit, draft_plan(run.config)
    source = draft_source(run, teacher, plan, Focus())
    sampling: dict[Call, Sampling] = {
        Call("teacher", "question"): draft_sampling(run, plan),
        Call("teacher", "rationale"): rationale_sampling(run, teacher, elicit.rationale_tokens),
        Call("student", "asked"): Sampling(max_tokens=run.asking(_form(run.config)).answer_tokens),
        Call("student", "generated"): Sampling(max_tokens=run.config.prefer.answer_tokens),
    }
    engines: dict[Who, Engine] = {"teacher": teacher, "student": student}
    generated = {(call.who, call.what): float(how.max_tokens) for call, how in sampling.items()}
    answers: dict[Call, list[Completion]] = {}
    # A model on this machine would take minutes for them.
    if run.config.teacher.on_server and not isinstance(teacher, TokenizerOnly):
        todo = [call for call in sampling if call.who == "teacher"]
        with run.reporter.bar("probe, answers", len(todo) * _PROBE_CALLS) as step:
            for call in todo:
                done = answers[call] = _answers(run, teacher, call, sampling[call])
                tokens = sum(answer.completion_tokens for answer in done)
                generated[call.who, call.what] = tokens / len(done)
                step(_PROBE_CALLS, tokens)
    lengths, calls = {}, list(calls)
    with run.reporter.bar("probe, lengths", len(calls)) as step:
        for call in calls:
            found = _lengths(run, engines[call.who], call)
            lengths[call] = replace(found, completion=generated.get((call.who, call.what), found.completion))
            step(1)
    if not (drafted := answers.get(Call("teacher", "question"))):
        return lengths, float(elicit.asked)
    source.requests(0, len(drafted), {})  # it remembers which answer each prompt asked for
    n_valid = sum(map(len, valid_drafts(run.task, elicit.rouge, drafted, source)))
    return lengths, max(n_valid / len(drafted), _FEWEST_DRAFTS)


def _answers(run: RunContext, engine: Engine, call: Call, sampling: Sampling) -> list[Completion]:
    prompts = _prompts(run, call)[:_PROBE_CALLS]
    answers = engine.complete([Request(prompt, i) for i, prompt in enumerate(prompts)], sampling)
    done = [answer for answer in answers if answer.finish != "error"]
    if not done:
        raise EngineError(f"The probe failed: {answers[0].error}", "Run the same command again.")
    return done


def _lengths(run: RunContext, engine: Engine, call: Call) -> Lengths:
    prompts = _prompts(run, call)
    prompt = sum(engine.count_tokens(text) for text in prompts) / len(prompts)
    if call.what not in ("constrained", "chosen", "vote"):
        return Lengths(prompt)
    examples, answer = run.task.validation[:_PROBE_PROMPTS], run.task.answer
    if answer.closed:  # every option is read after the question
        options = [option for example in examples for option in answer.options(example.input)]
        read = sum(engine.count_tokens(option + ANSWER_CLOSE) for option in options)
        return Lengths(prompt + read / len(examples))
    tokens = sum(engine.count_tokens(example.target + ANSWER_CLOSE) for example in examples)
    return Lengths(prompt, tokens / len(examples))


def _prompts(run: RunContext, call: Call) -> list[str]:
    """Return a few real prompts of a kind; the questions in them are validation examples."""
    config = run.config.teacher if call.who == "teacher" else run.config.student
    engine, task = run.engine(config), run.task
    examples = task.validation[:_PROBE_PROMPTS]
    if call.what == "question":
        plan = draft_plan(run.config)
        source = draft_source(run, engine, plan, Focus())
        return [request.prompt for request in source.requests(0, _PROBE_PROMPTS, {})]
    if call.what == "rationale":
        return [rationale_prompt(run, engine, example.input, None) for example in examples]
    shots = answer_shots(task.seed, call.shots)
    if call.what == "vote":
        return [run.render(engine, direct_messages(task, e.input, shots), ANSWER_OPEN, config) for e in examples]
    if call.what in ("asked", "chosen"):
        how = run.asking(_form(run.config))
        asked_after = [(shot.question, how.completion(shot.answer)) for shot in shots]
        return student_prompts(run, engine, how, examples, [Shot(*shot) for shot in asked_after])
    prefill = STEP_BY_STEP if call.what == "generated" else ANSWER_PREFILL
    return [run.render(engine, student_messages(task, e.input, shots), prefill, config) for e in examples]


def _form(config: RunConfig) -> Form:
    """Return the answer form of the estimate: an automatic one counts as the answer alone."""
    return "answer" if config.tune.target == "auto" else config.tune.target


def _notes(config: RunConfig, drafts_per_prompt: float, prices: Prices | None) -> list[str]:
    how = "Measured" if config.teacher.on_server else "Nothing was generated: answers as long as allowed"
    notes = [
        f"{how}, {drafts_per_prompt:.1f} valid questions per prompt. Rejected or relabelled drafts add calls; "
        "prefer.race may stop earlier."
    ]
    if config.tune.target == "auto":
        notes.append("tune.target: auto counts as the answer alone; a form with reasons adds rationales and tokens.")
    if config.data == "best-of-n":
        notes.append(f"best-of-n: {config.best_of} drafts for each training example (tailor.best_of).")
    if config.calibrate.models and (config.aligned or config.best_of > 1):
        notes.append("The further models of calibrate count like the teacher.")
    if config.teacher.on_server and prices is None:
        notes.append("Cost: add --prices PROMPT,COMPLETION, dollars per million tokens.")
    return notes


def _print_table(rows: Sequence[Mapping[str, Any]], *, priced: bool) -> None:
    from rich import box
    from rich.table import Table

    timed, paid = "hours" in rows[0], rows[0].get("gpu_usd") is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    more = (["USD"] if priced else []) + (["hours"] if timed else []) + (["GPU USD"] if paid else [])
    for name in ("calls", "prompt tokens", "completion tokens", *more):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row["stage"] == "total":
            table.add_section()
        cells = [row["stage"], *(f"{row[key]:,}" for key in ("calls", "prompt_tokens", "completion_tokens"))]
        cells += [f"{row['cost_usd']:,.2f}"] if priced else []
        cells += [f"{row['hours']:,.3f}"] if timed else []
        cells += [f"{row['gpu_usd']:,.2f}"] if paid else []
        table.add_row(*cells, style="bold" if row["stage"] == "total" else "")
    out.print(table)


def _rows(lines: Sequence[StageEstimate], *, priced: bool) -> list[dict[str, Any]]:
    """Return the lines as rows, the last one their total; without prices the cost is None."""
    keys = [field.name for field in fields(StageEstimate)[1:]]
    total = StageEstimate("total", **{key: sum(getattr(line, key) for line in lines) for key in keys})
    return [
        {
            "stage": line.stage,
            "calls": line.calls,
            "prompt_tokens": round(line.prompt_tokens),
            "completion_tokens": round(line.completion_tokens),
            "cost_usd": round(line.cost_usd, 4) if priced else None,
        }
        for line in (*lines, total)
    ]

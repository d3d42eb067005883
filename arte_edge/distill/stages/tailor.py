"""Step 5, tailor: the aligned teacher generates the student's training data (paper, section 3.5).

Questions are sampled with the prompt of alignment at temperature 1; rationales come from the naive
prompt, greedily: which technique to use is now the teacher's choice. Under a latency limit the
rationales have to fit it (`arte_edge.distill.generation.rationales`).

A teacher generates some labels far more often than others, and the balance of labels affects the student more than any
score of its drafts does (benchmarks/studies): of more usable examples than needed a balanced subset is taken.

Other arms select in place of aligning, or beside it. With ``best-of-n`` the original teacher, which may be a server,
writes n drafts for each example and the one that the student prefers is kept: n rationales of a question, or n inputs
where the student gives the answer alone. The technique arms (paper, section 5) keep the aligned teacher's questions and
choose among the original teacher's rationales, one a technique.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arte_edge.distill.config import TECHNIQUE_ARMS, RunConfig
from arte_edge.distill.generation.inputs import Focus
from arte_edge.distill.generation.questions import Drafts, QuestionPlan, draft_questions, elicit_inputs
from arte_edge.distill.generation.rationales import (
    direct_choices,
    label_drafts,
    over_budget,
    reject_repeated,
    resample,
    sampled,
    short_shots,
)
from arte_edge.distill.preference.adaptive import interleave_answers
from arte_edge.distill.run_context import Row, RunContext, Summary, tells_labels
from arte_edge.distill.stages.elicit import draft_source
from arte_edge.distill.stages.prefer import scored_rows, scoring_inputs
from arte_edge.errors import StoppedEarly
from arte_edge.runtimes.completion import Engine
from arte_edge.tasks.task import Task

_MAX_ROUNDS = 6
_LEAST_KEPT = 0.1  # share of questions: a teacher that drops more is not planned for
# A weak teacher contradicts itself on a third of its questions, but seldom on inputs for a given answer; one large
# batch is faster than two small ones.
_OVERSAMPLE, _OVERSAMPLE_TOLD = 1.6, 1.25


def tailor(run: RunContext, adapter: tuple[Path, str] | None, focus: Focus, number: int = 1) -> Summary:
    """Write train.jsonl of round `number`: rows of input, label, rationale; for soft labels with `choices`.

    `adapter` (path, sha256) aligns the teacher. `focus` says which answers need more inputs
    (`generation.inputs`). No input repeats one of an earlier round.

    Raises StoppedEarly: the teacher's budget of prompts is spent before enough examples were usable.
    """
    teacher, name = run.config.teacher, run.round_name("tailor", number)
    with run.stage(name, _inputs(run, adapter[1] if adapter else "", focus, number), _describe) as stage:
        if stage.todo:
            aligned = run.engine_with(run.local(teacher), adapter, teacher) if adapter else run.engine(teacher)
            rows, rejected, scores, summary = _generate_examples(run, aligned, focus, number)
            stage.write("train.jsonl", rows)
            stage.write("rejected.jsonl", rejected)
            if scores:
                stage.write("scores.jsonl", scores)
            stage.finish(summary)
    return stage.summary


def tailor_plan(config: RunConfig, task: Task, n: int = 0, number: int = 1, *, reasons: bool = True) -> QuestionPlan:
    """Return how `n` questions are drafted in round `number`; 0: as many as at first, for labelling drops some.

    Without `reasons` the best of n are chosen among questions, so there are n times as many.
    """
    tailor = config.tailor
    more = _OVERSAMPLE_TOLD if tells_labels(config, task) else _OVERSAMPLE
    first = tailor.questions if tailor.label == "teacher" else math.ceil(tailor.questions * more)
    n = n or first * (1 if reasons else config.best_of)
    # Other samples of seeds than in elicit.
    return QuestionPlan(config.elicit, n, tailor.temperature, tailor.max_prompts, config.seed + number)


def _inputs(run: RunContext, adapter_sha256: str, focus: Focus, number: int) -> dict[str, Any]:
    unused = set() if run.task.answer.closed else {"even_labels"}
    unused |= set() if run.config.best_of > 1 else {"best_of"}
    return {
        "tailor": run.config.tailor.model_dump(mode="json", exclude=unused),
        "elicit": elicit_inputs(run),
        "teacher": run.identity(run.config.teacher),
        "adapter": adapter_sha256,
        "task": run.task.sha256,
        "focus": [dict(focus.weight), focus.confused],
        "earlier": run.outputs(*_earlier(run, number)),
        **run.data_inputs(),
        **run.budget_inputs(),
        **({"choices": True} if run.config.tune.soft_labels else {}),
        **({} if run.budget is None else {"draws": run.config.deploy.draws}),
        **_selection_inputs(run),
    }


def _selection_inputs(run: RunContext) -> dict[str, Any]:
    """Return what decides which of several drafts is kept; nothing where one is written."""
    data = run.config.data
    if data not in ("best-of-n", *TECHNIQUE_ARMS):
        return {}
    if data == "one-technique":
        return {"selection": data, "scores": run.outputs("prefer")}
    n_draft = run.config.tailor.questions * run.config.best_of
    return {"selection": data, **({} if data == "random-technique" else scoring_inputs(run, n_draft, "calibrate"))}


def _earlier(run: RunContext, number: int) -> list[str]:
    return [run.round_name("tailor", n) for n in range(1, number)]


def _generate_examples(
    run: RunContext, engine: Engine, focus: Focus, number: int
) -> tuple[list[Row], list[Row], list[Row], Summary]:
    """Return the training examples, the rejected drafts, the scores if drafts were scored, and the summary.

    Labelling drops some questions, so more are generated until enough are left.
    """
    config = run.config.tailor
    several = 1 if run.reasons else run.config.best_of
    needed, usable = config.questions * several, dict[str, list[Row]]()
    first = tailor_plan(run.config, run.task, number=number, reasons=run.reasons).needed
    n_question = max(first, math.ceil(needed / max(_kept_before(run, number), _LEAST_KEPT)))
    for _ in range(_MAX_ROUNDS):
        drafts, rationales, labels = _generate(
            run, engine, tailor_plan(run.config, run.task, n_question, number), focus
        )
        usable, n_long = _usable(run, rationales)
        if len(usable) >= needed:
            break
        share = max(len(usable) / len(drafts.valid), _LEAST_KEPT)
        n_question = max(n_question + 8, round(needed / share * 1.05))
    else:
        raise StoppedEarly(
            f"tailor: {len(usable)} of {needed} examples usable out of {n_question} questions "
            f"(label policy {config.label}, readable rationales {labels['readable']:.0%}, "
            f"{labels['parroted']} repeated" + (f", {n_long} over the latency budget)" if n_long else ")"),
            "Lower tailor.questions, set tailor.label = 'vote' or 'teacher', or use a stronger teacher.",
        )
    questions = {q["id"]: q for q in drafts.valid if q["id"] in usable}
    picked = _select(run, questions, usable, number)
    order = list(questions)
    if several > 1:  # the student's preferred questions first
        order.sort(key=lambda key: -picked.score[key])
    even = config.even_labels and run.task.answer.closed and not focus.weight
    examples = [
        {
            "id": key,
            "input": questions[key]["input"],
            "label": questions[key]["label"],
            "rationale": picked.rationale[key]["text"],
        }
        for key in order
    ]
    rows = _balanced(examples, config.questions) if even else examples[: config.questions]
    if run.config.tune.soft_labels:  # the calls were made for the labels
        engine = _labelling_engine(run, engine)
        found = direct_choices(run, engine, rows, "soft labels")
        rows = [row | {"choices": choices} for row, choices in zip(rows, found, strict=True)]
    words = [len(row["rationale"].split()) for row in rows]
    kept = [picked.rationale[row["id"]] for row in rows]
    summary = {
        "examples": len(rows),
        "questions": len(drafts.valid),
        "prompts": drafts.prompts,
        "rejected": drafts.reasons(),
        "labels": labels,
        "answers": dict(Counter(row["label"] for row in rows).most_common(10)),
        "rationale_words": round(sum(words) / max(len(words), 1), 1),
        **({} if run.budget is None else {"over_budget": n_long, "drawn_again": _n_drawn(run, kept)}),
        **({"selection": picked.summary(rows, rationales)} if picked.scores else {}),
    }
    return rows, drafts.rejected, picked.scores, summary


def _kept_before(run: RunContext, number: int) -> float:
    """Return the share of questions whose label was kept when this run drafted some the last time; 1 if it did not."""
    policies = {run.config.tailor.label, run.config.elicit.label}
    direct = run.by_label and (run.role == "inputs" or "teacher" not in policies)  # see `label_drafts`
    same = direct or len(policies) == 1
    for name in (*reversed(_earlier(run, number)), *(["elicit"] if same else [])):
        if summary := run.summaries.get(name):
            return 1.0 - float(summary["labels"].get("questions_dropped", 0.0))
    return 1.0


def _n_drawn(run: RunContext, rationales: Sequence[Row]) -> int:
    return 0 if run.config.best_of > 1 else sum(bool(row.get("drawn")) for row in rationales)


def _labelling_engine(run: RunContext, engine: Engine) -> Engine:
    """Return the teacher that labels the questions of `engine`: in the technique arms the original one."""
    return run.engine(run.config.teacher) if run.config.data in TECHNIQUE_ARMS else engine


def _generate(run: RunContext, engine: Engine, plan: QuestionPlan, focus: Focus) -> tuple[Drafts, list[Row], Row]:
    """Generate questions with rationales; return them, and what labelling changed."""
    config = run.config.tailor
    source = draft_source(run, engine, plan, focus)
    known = [
        row["input"] for name in _earlier(run, plan.seed - run.config.seed) for row in run.read(name, "train.jsonl")
    ]
    drafts = draft_questions(run, engine, plan, "tailored questions", source, known)
    techniques: Sequence[str | None] = run.task.techniques if run.config.data in TECHNIQUE_ARMS else [None]
    engine = _labelling_engine(run, engine)
    # Not truncated at a latency budget: a truncated rationale teaches the student to stop early.
    shots = short_shots(run)
    rationales, labels = label_drafts(run, engine, drafts.valid, techniques, config.label, "tailored", shots)
    if not run.reasons:
        return drafts, rationales, labels | {"parroted": 0}
    every = [*rationales]
    if run.config.best_of > 1:
        samples = range(1, run.config.best_of)  # beside the greedy one
        every += sampled(run, engine, drafts.valid, samples, config.label, "sampled rationales")
    every += resample(run, engine, drafts.valid, every, config.label)
    return drafts, every, labels | {"parroted": reject_repeated(every)}


def _usable(run: RunContext, rationales: Sequence[Row]) -> tuple[dict[str, list[Row]], int]:
    """Return the usable rationales of each question, and how many questions have only too long ones."""
    usable = [row for row in rationales if row["usable"]]
    long = {id(row) for row in over_budget(run, usable)}
    short: dict[str, list[Row]] = defaultdict(list)
    for row in usable:
        if id(row) not in long and all(row["text"] != other["text"] for other in short[row["question"]]):
            short[row["question"]].append(row)
    found = {key: rows for key, rows in short.items() if rows}
    return found, len({row["question"] for row in usable} - set(found))


@dataclass(frozen=True)
class _Selection:
    """The kept rationale of each question and its score, by question; and, if any were scored, the rows of all."""

    rationale: dict[str, Row]
    score: dict[str, float]
    scores: list[Row]
    cells: int = 0  # answers of the student that the scores took; for influence, gradients

    def summary(self, examples: Sequence[Row], written: Sequence[Row]) -> Summary:
        """Return what the selection cost and gained; `written` are all rationales of the teacher."""
        kept = [self.score[row["id"]] for row in examples]
        return {
            "written": len(written),
            "teacher_tokens": sum(row["tokens"] for row in written),
            "scored": len(self.scores),
            "student_answers": self.cells,
            "mean": round(float(np.mean([row["score"] for row in self.scores])), 6),
            "kept": round(float(np.mean(kept)), 6),
        }


def _select(run: RunContext, questions: dict[str, Row], usable: dict[str, list[Row]], number: int) -> _Selection:
    """Keep one usable rationale of each question, by the rule of the run's data."""
    data = run.config.data
    if data == "random-technique":
        seed = f"{run.config.seed}/technique/{number}"
        return _Selection({q: random.Random(f"{seed}/{q}").choice(usable[q]) for q in questions}, {}, [])
    if data == "one-technique":
        # Techniques in the order of the student's preference: the next where the best has no usable rationale.
        scores: dict[int, list[float]] = defaultdict(list)
        for row in run.read("prefer", "scores.jsonl"):
            scores[row["technique"]].append(row["score"])
        rank = {t: float(np.mean(values)) for t, values in scores.items()}
        best = {q: max(usable[q], key=lambda row: rank.get(row["technique"], -math.inf)) for q in questions}
        return _Selection(best, {}, [])
    if data not in ("best-of-n", "preferred-rationale"):
        return _Selection({q: usable[q][0] for q in questions}, {}, [])
    drafts = [row for q in questions for row in usable[q]]
    rows, summary = scored_rows(run, drafts, questions)
    kept: dict[str, tuple[float, Row]] = {}
    for draft, row in zip(drafts, rows, strict=True):
        key = draft["question"]
        if key not in kept or row["score"] > kept[key][0]:
            kept[key] = row["score"], draft
    best = {key: draft for key, (_, draft) in kept.items()}
    return _Selection(best, {key: score for key, (score, _) in kept.items()}, rows, summary["measured"])


def _balanced(rows: list[Row], n: int) -> list[Row]:
    """Return `n` of the rows, in their order, with labels as balanced as the rows allow."""
    order = interleave_answers([row["label"] for row in rows])
    return [rows[place] for place in sorted(order[:n])]


def _describe(summary: Summary) -> str:
    labels = summary["labels"]
    agree = f", the teacher's own answer agrees with {labels['votes_agree']:.0%}" if "votes_agree" in labels else ""
    words = f", {summary['rationale_words']:.0f} words per rationale" if labels["readable"] else ""
    chosen = ""
    if picked := summary.get("selection"):
        chosen = (
            f"; of {picked['scored']} drafts ({picked['teacher_tokens']:,} tokens of the teacher's rationales, "
            f"{picked['student_answers']:,} calls of the student) those kept score {picked['kept']:.3f}, all "
            f"{picked['mean']:.3f}"
        )
    return f"{summary['examples']} training examples from {summary['questions']} questions{agree}{words}{chosen}"

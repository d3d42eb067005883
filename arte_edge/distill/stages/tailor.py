"""Step 5, tailor: the aligned teacher generates the student's training data (paper, section 3.5).

Questions are sampled with the prompt of alignment at temperature 1; rationales come from the naive
prompt, greedily: which technique to use is now the teacher's choice. Under a latency limit the
rationales have to fit it (`arte_edge.distill.generation.rationales`).

A teacher generates some labels far more often than others, and the balance of labels affects the
student more than any score of its drafts does (benchmarks/studies): of more usable examples than needed
a balanced subset is taken.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arte_edge.distill.config import RunConfig
from arte_edge.distill.generation.inputs import Focus
from arte_edge.distill.generation.questions import Drafts, QuestionPlan, draft_questions
from arte_edge.distill.generation.rationales import (
    label_drafts,
    over_budget,
    reject_repeated,
    resample,
    short_shots,
)
from arte_edge.distill.preference.adaptive import interleave_answers
from arte_edge.distill.run_context import Row, RunContext, Summary, tells_labels
from arte_edge.distill.stages.elicit import draft_source
from arte_edge.errors import StoppedEarly
from arte_edge.runtimes.completion import Engine
from arte_edge.tasks.task import Task

__all__ = ["tailor", "tailor_plan"]

_MAX_ROUNDS = 6
# A weak teacher contradicts itself on a third of its questions, but seldom on inputs for a given answer; one large
# batch is faster than two small ones.
_OVERSAMPLE, _OVERSAMPLE_TOLD = 1.6, 1.25


def tailor(run: RunContext, adapter: tuple[Path, str] | None, focus: Focus, number: int = 1) -> Summary:
    """Write train.jsonl of round `number`: rows of input, label, rationale.

    `adapter` (path, sha256) aligns the teacher. `focus` says which answers need more inputs
    (`generation.inputs`). No input repeats one of an earlier round.

    Raises StoppedEarly: the teacher's budget of prompts is spent before enough examples were usable.
    """
    teacher, name = run.config.teacher, run.round_name("tailor", number)
    with run.stage(name, _inputs(run, adapter[1] if adapter else "", focus, number), _describe) as stage:
        if stage.todo:
            aligned = (
                run.engine_with(run.local(teacher), adapter, teacher) if adapter else run.engine(teacher)
            )
            rows, rejected, summary = _generate_examples(run, aligned, focus, number)
            stage.write("train.jsonl", rows)
            stage.write("rejected.jsonl", rejected)
            stage.finish(summary)
    return stage.summary


def tailor_plan(config: RunConfig, task: Task, n: int = 0, number: int = 1) -> QuestionPlan:
    """Return how `n` questions are drafted in round `number`; 0: as many as at first, for labelling drops some."""
    tailor = config.tailor
    more = _OVERSAMPLE_TOLD if tells_labels(config, task) else _OVERSAMPLE
    n = n or (tailor.questions if tailor.label == "teacher" else math.ceil(tailor.questions * more))
    # Other samples of seeds than in elicit.
    return QuestionPlan(config.elicit, n, tailor.temperature, tailor.max_prompts, config.seed + number)


def _inputs(run: RunContext, adapter_sha256: str, focus: Focus, number: int) -> dict[str, Any]:
    unused = set() if run.task.answer.closed else {"even_labels"}
    return {
        "tailor": run.config.tailor.model_dump(mode="json", exclude=unused),
        "elicit": run.config.elicit.model_dump(mode="json"),
        "teacher": run.identity(run.config.teacher),
        "adapter": adapter_sha256,
        "task": run.task.sha256,
        "focus": [dict(focus.weight), focus.confused],
        "earlier": run.outputs(*_earlier(run, number)),
        **run.data_inputs(),
        **run.budget_inputs(),
        **({} if run.budget is None else {"draws": run.config.deploy.draws}),
    }


def _earlier(run: RunContext, number: int) -> list[str]:
    return [run.round_name("tailor", n) for n in range(1, number)]


def _generate_examples(
    run: RunContext, engine: Engine, focus: Focus, number: int
) -> tuple[list[Row], list[Row], Summary]:
    """Return the training examples, the rejected drafts and the summary.

    Labelling drops some questions, so more are generated until enough are left.
    """
    config = run.config.tailor
    needed, rows, n_resampled = config.questions, [], 0
    n_question = tailor_plan(run.config, run.task).needed
    for _ in range(_MAX_ROUNDS):
        drafts, rationales, labels = _generate(
            run, engine, tailor_plan(run.config, run.task, n_question, number), focus
        )
        usable, n_long = _usable(run, rationales)
        chosen = [(q, usable[q["id"]]) for q in drafts.valid if q["id"] in usable]
        rows = [
            {"id": q["id"], "input": q["input"], "label": q["label"], "rationale": rationale["text"]}
            for q, rationale in chosen
        ]
        n_resampled = sum(bool(rationale.get("drawn")) for _, rationale in chosen)
        if len(rows) >= needed:
            break
        share = max(len(rows) / len(drafts.valid), 0.1)
        n_question = max(n_question + 8, round(needed / share * 1.05))
    else:
        raise StoppedEarly(
            f"tailor: {len(rows)} of {needed} examples usable out of {n_question} questions "
            f"(label policy {config.label}, readable rationales {labels['readable']:.0%}, "
            f"{labels['parroted']} repeated" + (f", {n_long} over the latency budget)" if n_long else ")"),
            "Lower tailor.questions, set tailor.label = 'vote' or 'teacher', or use a stronger teacher.",
        )
    even = config.even_labels and run.task.answer.closed and not focus.weight
    rows = _balanced(rows, needed) if even else rows[:needed]
    words = [len(row["rationale"].split()) for row in rows]
    summary = {
        "examples": len(rows),
        "questions": len(drafts.valid),
        "prompts": drafts.prompts,
        "rejected": drafts.reasons(),
        "labels": labels,
        "answers": dict(Counter(row["label"] for row in rows).most_common(10)),
        "rationale_words": round(sum(words) / max(len(words), 1), 1),
        **({} if run.budget is None else {"over_budget": n_long, "drawn_again": n_resampled}),
    }
    return rows, drafts.rejected, summary


def _generate(
    run: RunContext, engine: Engine, plan: QuestionPlan, focus: Focus
) -> tuple[Drafts, list[Row], Row]:
    """Generate questions with rationales; return them, and what labelling changed."""
    config, teacher = run.config.tailor, run.config.teacher
    source = draft_source(run, engine, plan, focus)
    known = [
        row["input"]
        for name in _earlier(run, plan.seed - run.config.seed)
        for row in run.read(name, "train.jsonl")
    ]
    drafts = draft_questions(run, engine, plan, "tailored questions", source, known)
    # Not truncated at a latency budget: a truncated rationale teaches the student to stop early.
    shots = short_shots(run, teacher)
    rationales, labels = label_drafts(run, engine, drafts.valid, [None], config.label, "tailored", shots)
    if not run.reasons:
        return drafts, rationales, labels | {"parroted": 0}
    every = [*rationales, *resample(run, engine, teacher, drafts.valid, rationales, config.label)]
    return drafts, every, labels | {"parroted": reject_repeated(every)}


def _usable(run: RunContext, rationales: Sequence[Row]) -> tuple[dict[str, Row], int]:
    """Return the first usable rationale of each question, and how many questions have only too long ones."""
    usable = [row for row in rationales if row["usable"]]
    long = {id(row) for row in over_budget(run, usable)}
    chosen: dict[str, Row] = {}
    for row in usable:
        if id(row) not in long:
            chosen.setdefault(row["question"], row)
    return chosen, len({row["question"] for row in usable} - set(chosen))


def _balanced(rows: list[Row], n: int) -> list[Row]:
    """Return `n` of the rows, in their order, with labels as balanced as the rows allow."""
    order = interleave_answers([row["label"] for row in rows])
    return [rows[place] for place in sorted(order[:n])]


def _describe(summary: Summary) -> str:
    labels = summary["labels"]
    agree = (
        f", the teacher's own answer agrees with {labels['votes_agree']:.0%}"
        if "votes_agree" in labels
        else ""
    )
    words = f", {summary['rationale_words']:.0f} words per rationale" if labels["readable"] else ""
    return f"{summary['examples']} training examples from {summary['questions']} questions{agree}{words}"

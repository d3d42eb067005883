"""Step 5, tailor: the aligned teacher writes the student's training data (paper, section 3.5).

Questions are drawn with the prompt of alignment at temperature 1; rationales come
from the naive prompt, greedily: which technique to use is now the teacher's choice. What the
student's device has no time for trains nobody; how the teacher is brought to keep within that time is
said in `arte_edge.distill.within`.

A teacher asks for some labels far more often than for others, and how evenly they are spread moves
what the student learns more than any score of its drafts does (docs/score-worth.md): of more usable
examples than wanted those are taken that spread them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from arte_edge.distill.parrots import refuse_parrots
from arte_edge.distill.questions import Drafts, QuestionPlan, draft_questions
from arte_edge.distill.race import spread_answers
from arte_edge.distill.rationales import label_rows, opinions, write_rationales
from arte_edge.distill.run import Run, Summary
from arte_edge.distill.within import brief_shots, draw_again, too_long
from arte_edge.errors import StoppedEarly
from arte_edge.runtimes.completion import Engine
from arte_edge.store import Stage

__all__ = ["tailor"]

Row = dict[str, Any]

_MOST_ROUNDS = 6
_FIRST_ASK = (
    1.6  # a weak teacher contradicts itself on a third of its questions; one large batch beats two small
)


def tailor(run: Run, engine: Callable[[], Engine], adapter_sha256: str) -> Summary:
    """Write train.jsonl: rows of input, label, rationale. `engine` opens the aligned teacher.

    Raises:
        StoppedEarly: the teacher's budget of prompts is spent before enough examples were usable.
    """
    config = run.config.tailor

    def body(stage: Stage) -> Summary:
        wanted, rows, rejected, prompts, drawn = config.questions, [], [], 0, 0
        # Labels drop some questions, so the teacher is asked for more until enough are left.
        asked = wanted if config.label == "teacher" else math.ceil(wanted * _FIRST_ASK)
        for _ in range(_MOST_ROUNDS):
            drafts, rationales, labels = _write(run, engine(), asked)
            usable, dropped = _chosen(run, rationales)
            rows = [
                {
                    "id": q["id"],
                    "input": q["input"],
                    "label": q["label"],
                    "rationale": usable[q["id"]]["text"],
                }
                for q in drafts.valid
                if q["id"] in usable
            ]
            rejected, prompts = drafts.rejected, drafts.prompts
            drawn = sum(bool(usable[q["id"]].get("drawn")) for q in drafts.valid if q["id"] in usable)
            if len(rows) >= wanted:
                break
            share = max(len(rows) / len(drafts.valid), 0.1)
            asked = max(asked + 8, round(wanted / share * 1.05))
        else:
            raise StoppedEarly(
                f"tailor: {len(rows)} of {wanted} examples usable out of {asked} questions "
                f"(label policy {config.label}, readable rationales {labels['readable']:.0%}, "
                f"{labels['parroted']} parroted"
                + (f", {dropped} too long for the device)" if dropped else ")"),
                "Lower tailor.questions, take tailor.label = 'vote' or 'teacher', or a stronger teacher.",
            )
        rows = _even(rows, wanted) if config.even_labels and run.task.answer.closed else rows[:wanted]
        stage.write("train.jsonl", rows)
        stage.write("rejected.jsonl", rejected)
        words = [len(row["rationale"].split()) for row in rows]
        return {
            "examples": len(rows),
            "questions": len(drafts.valid),
            "prompts": prompts,
            "rejected": drafts.reasons(),
            "labels": labels,
            "answers": _spread(rows),
            "rationale_words": round(sum(words) / max(len(words), 1), 1),
            **({} if run.budget is None else {"over_budget": dropped, "drawn_again": drawn}),
        }

    unused = set() if run.task.answer.closed else {"even_labels"}
    inputs: dict[str, Any] = {
        "tailor": config.model_dump(mode="json", exclude=unused),
        "elicit": run.config.elicit.model_dump(mode="json"),
        "teacher": run.identity(run.config.teacher),
        "adapter": adapter_sha256,
        "task": run.task.sha256,
        **run.deploy_inputs(),
        **({} if run.budget is None else {"draws": run.config.deploy.draws}),
    }
    return run.stage("tailor", inputs, body, _say)


def _write(run: Run, engine: Engine, n: int) -> tuple[Drafts, list[Row], Row]:
    config, elicit, teacher = run.config.tailor, run.config.elicit, run.config.teacher
    plan = QuestionPlan(
        wanted=n,
        shown=elicit.shown,
        asked=elicit.asked,
        one_draw=elicit.one_draw,
        temperature=config.temperature,
        top_p=run.config.elicit.top_p,
        tokens=elicit.question_tokens,
        rouge=elicit.rouge,
        max_prompts=config.max_prompts,
        seed=run.config.seed + 1,  # other draws of seeds than in elicit
    )
    drafts = draft_questions(run, engine, teacher, plan, "tailored questions")
    # Not cut off at a device's budget: a rationale that breaks off teaches the student to break off.
    tokens = elicit.rationale_tokens
    rationales = write_rationales(
        run, engine, teacher, drafts.valid, [None], tokens, "tailored rationales", brief_shots(run, teacher)
    )
    votes = opinions(run, engine, teacher, drafts.valid, "bare answers")
    labels = label_rows(run, drafts.valid, rationales, votes, config.label)
    written = [*rationales, *draw_again(run, engine, teacher, drafts.valid, rationales, config.label)]
    return drafts, written, labels | {"parroted": refuse_parrots(written)}


def _chosen(run: Run, rationales: Sequence[Row]) -> tuple[dict[str, Row], int]:
    """Return each question's first rationale that may be used, and how many questions have but too long ones."""
    usable = [row for row in rationales if row["usable"]]
    long = {id(row) for row in too_long(run, usable)}
    chosen: dict[str, Row] = {}
    for row in usable:
        if id(row) not in long:
            chosen.setdefault(row["question"], row)
    return chosen, len({row["question"] for row in usable} - set(chosen))


def _even(rows: list[Row], wanted: int) -> list[Row]:
    """Return `wanted` of the rows, in their order, with every label about as often as its rows allow."""
    order = spread_answers([row["label"] for row in rows])
    return [rows[place] for place in sorted(order[:wanted])]


def _spread(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Count the labels; of many different ones only the most frequent ten."""
    from collections import Counter

    return dict(Counter(row["label"] for row in rows).most_common(10))


def _say(summary: Summary) -> str:
    return (
        f"{summary['examples']} training examples from {summary['questions']} questions, "
        f"{summary['rationale_words']:.0f} words a rationale"
    )

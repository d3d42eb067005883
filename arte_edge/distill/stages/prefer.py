"""Step 3, prefer: the student's score of every draft (paper, section 3.3).

A draft example (question, rationale) is shown to the student as its only example; the score says how
well the student then answers the preference set. Three such scores, and one of training:

* ``accuracy``: the student generates, the tagged answer must match (the paper's);
* ``forced``: the prompt opens the answer tag and the choices are compared;
* ``likelihood``: the probability of the right answer, without generating anything;
* ``influence``: what a training step on the draft does to that probability, to first order.

The score of a question is the mean over its rationales. On a closed answer set drafts are ranked
without the answer bias that they induce (`preference.scoring`) and without what their length explains.
Under a latency limit, drafts that are too long are penalized (`arte_edge.distill.latency`); not an influence, which is
signed and that of training data, of which tailoring takes none that is too long.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from arte_edge.distill.generation.rationales import student_text
from arte_edge.distill.preference.scoring import Score, is_adaptive, length_effect, score_drafts, scoring_engine
from arte_edge.distill.prompts import Shot
from arte_edge.distill.run_context import Row, RunContext, Summary
from arte_edge.runtimes.completion import Engine
from arte_edge.stats import pearson
from arte_edge.tasks.task import Example


def prefer(run: RunContext) -> Summary:
    """Write scores.jsonl (one row per rationale) and questions.jsonl (one row per question)."""
    drafts = [row for row in run.read("elicit", "rationales.jsonl") if row["usable"]]
    inputs = scoring_inputs(run, len(drafts), "elicit", "calibrate")
    with run.stage("prefer", inputs, _describe) as stage:
        if stage.todo:
            questions = {row["id"]: row for row in run.read("elicit", "questions.jsonl")}
            if run.config.prefer.score == "influence":
                run.close_engines()  # the gradients need the memory that the teacher's takes
            rows, summary = scored_rows(run, drafts, questions)
            stage.write("scores.jsonl", rows)
            stage.write("questions.jsonl", _question_means(rows, questions))
            stage.finish(summary)
    return stage.summary


def scored_rows(
    run: RunContext, drafts: Sequence[Row], questions: dict[str, Row], *, may_adapt: bool = True
) -> tuple[list[Row], Summary]:
    """Score `drafts` (rationales of `questions`, by id) as the run is configured; return a row each, and a summary.

    Not `may_adapt`, every draft is measured on all questions: adaptive scoring finds the ends of an order, and draws
    what it did not measure towards the mean.
    """
    config, closed = run.config.prefer, run.task.answer.closed
    examples = _preference_set(run)
    adaptive = may_adapt and is_adaptive(config, len(drafts), len(examples))
    length_free = config.length_free and closed
    shots = [Shot(questions[d["question"]]["input"], d["text"]) for d in drafts]
    groups = [d["question"] for d in drafts]
    share = config.race_share if adaptive else 1.0
    engine = scoring_engine(run, round(share * len(drafts) * len(examples)))
    tokens = np.array([engine.count_tokens(f" {draft['text'].strip()}") for draft in drafts], dtype=float)
    scored = score_drafts(
        run, engine, shots, groups, examples, adaptive=adaptive, tokens=tokens if length_free else None
    )
    free = config.bias_free and closed
    plain = np.array([score.free if free else score.value for score in scored.scores])
    by_length = length_effect(plain, tokens) if length_free else np.zeros(len(plain))
    rows = [_row(run, engine, *one) for one in zip(drafts, scored.scores, plain, by_length, strict=True)]
    summary = _summary(rows, plain, len(examples)) | {"measured": scored.cells}
    summary["engine"] = f"{engine.identity.kind} {engine.identity.quantization}".strip()
    if adaptive or any(scored.errors):
        for row, items, error in zip(rows, scored.items, scored.errors, strict=True):
            row |= {"items": items, "standard_error": round(error, 6)}
    if adaptive:
        race = {"measured": scored.cells, "of": scored.of_cells, "rounds": scored.rounds}
        summary["race"] = race | {"open": scored.open, "error": config.race_error}
    return rows, summary


def _preference_set(run: RunContext) -> list[Example]:
    return [Example(r["input"], r["target"]) for r in run.read("calibrate", "preference_set.jsonl")]


def scoring_inputs(run: RunContext, n_draft: int, *stages: str) -> dict[str, Any]:
    """Return what decides the scores of `n_draft` drafts that come of `stages`."""
    adaptive = is_adaptive(run.config.prefer, n_draft, len(_preference_set(run)))
    config = run.config.prefer
    # A key without effect must not be an input: older runs were made without it.
    unused = {"race"}
    unused |= set() if config.student_file else {"student_file"}
    unused |= {"engine"} if config.engine == "auto" else set()
    unused |= set() if run.task.answer.closed else {"length_free"}
    unused |= set() if adaptive else {"race_share", "race_error"}
    training = {}
    if config.score == "influence":
        unused |= {"engine", "answer_tokens"}
        training = {"form": run.form, "learning_rate": run.config.tune.learning_rate}
    return {
        **training,
        "prefer": config.model_dump(mode="json", exclude=unused),
        "student": run.identity(run.config.student),
        "data": run.outputs(*stages),
        **run.budget_inputs(),
    }


def _row(run: RunContext, engine: Engine, draft: Row, score: Score, plain: float, by_length: float) -> Row:
    """Return a row of scores.jsonl: `plain` ranks drafts before `by_length` is taken out."""
    budget = {}
    if run.budget is not None and run.reasons:
        n, most = engine.count_tokens(f" {student_text(run, draft['text'])}"), run.budget.answer_tokens
        budget = {"student_tokens": n, "over_budget": n > most}
        if run.config.prefer.score in ("likelihood", "forced"):  # for accuracy the student itself was cut off
            from arte_edge.distill.latency import penalize_length

            plain = penalize_length(plain, n, most, log=not run.task.answer.closed)
    final = float(plain - by_length)
    return {
        "question": draft["question"],
        "technique": draft["technique"],
        "score": round(final, 6),
        "measured": round(score.value, 6),
        "bias_free": round(score.free, 6),
        "bias": round(score.bias, 6),
        "length": round(float(by_length), 6),
        "accuracy": None if np.isnan(score.accuracy) else round(score.accuracy, 6),
        "tokens": draft["tokens"],
        "text": draft["text"],
        **budget,
    }


def _question_means(rows: Sequence[Row], questions: dict[str, Row]) -> list[Row]:
    by_question: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_question[row["question"]].append(row)
    return [
        {
            "id": key,
            "input": questions[key]["input"],
            "target": questions[key]["label"],
            "score": round(float(np.mean([row["score"] for row in own])), 6),
            "rationales": len(own),
            **_mean_error(own),
        }
        for key, own in by_question.items()
    ]


def _mean_error(rows: Sequence[Row]) -> Row:
    """Return the standard error of the mean score, where the scores have one."""
    if "standard_error" not in rows[0]:
        return {}
    return {"standard_error": round(math.hypot(*(row["standard_error"] for row in rows)) / len(rows), 6)}


def _summary(rows: Sequence[Row], plain: np.ndarray[Any, Any], k: int) -> Summary:
    """Return the distribution of the scores; `plain` ``[d]`` are those before length was taken out."""
    score = np.array([row["score"] for row in rows])
    measured = np.array([row["measured"] for row in rows])
    bias = np.array([row["bias"] for row in rows])
    tokens = np.array([row["tokens"] for row in rows], dtype=float)
    return {
        "drafts": len(rows),
        "k": k,
        "mean": float(score.mean()),
        "sd": float(score.std()),
        "bias_mean": float(bias.mean()),
        "measured_against_bias": _correlation(measured, bias),
        "score_against_bias": _correlation(score, bias),
        "score_against_length": _correlation(score, tokens),
        "plain_against_length": _correlation(plain, tokens),
        **({"over_budget": sum(r["over_budget"] for r in rows)} if "over_budget" in rows[0] else {}),
    }


def _correlation(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float | None:
    found = pearson(a, b)
    return None if found is None else round(found, 4)


def _describe(summary: Summary) -> str:
    parts = [
        f"{summary['drafts']} drafts × {summary['k']} questions, score {summary['mean']:.3f}, "
        f"standard deviation between drafts {summary['sd']:.3f}"
    ]
    # A stage that an earlier version finished does not name the engine.
    if floats := summary.get("engine", "").partition("transformers ")[2]:
        parts.append(f"in {floats}")
    if long := summary.get("over_budget"):
        parts.append(f"{long} over the latency budget")
    if race := summary.get("race"):
        share = race["measured"] / race["of"]
        parts.append(
            f"adaptive: {race['measured']} of {race['of']} scores measured ({share:.0%}), ranks of {race['open']} "
            f"drafts still undecided (risk above {race['error']:.0%})"
        )
    return "; ".join(parts)

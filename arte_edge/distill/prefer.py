"""Step 3, prefer: the student's one-shot score of every draft (paper, section 3.3).

A draft example (question, rationale) is shown to the student as its only example; the
score says how well the student then answers the preference set. Three ways to score:

* ``accuracy``: the student writes, the tagged answer must match (the paper's);
* ``forced``: the answer tag is opened for it and the choices are compared;
* ``likelihood``: the probability of the right answer, no text written at all.

A question's score is the mean over its rationales. On a closed answer set drafts are ordered without the answer
bias that they induce (`arte_edge.distill.scores`) and without what their length explains
(`arte_edge.distill.length`). Where the device's time is limited, drafts that are too long pay for it
(`arte_edge.distill.deploy`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from arte_edge.distill.deploy import pay
from arte_edge.distill.deployed import compare, sample_drafts
from arte_edge.distill.length import length_share
from arte_edge.distill.prompts import Worked
from arte_edge.distill.racing import Raced, is_raced, race_scores
from arte_edge.distill.run import Run, Summary
from arte_edge.distill.scorer import scoring_engine
from arte_edge.distill.scores import Score
from arte_edge.distill.scoring import by_probability, by_writing, item_scores
from arte_edge.runtimes.completion import Engine
from arte_edge.stats import pearson
from arte_edge.store import Stage
from arte_edge.tasks.task import Example

__all__ = ["prefer"]

Row = dict[str, Any]

_COMPARED_DRAFTS = 24  # scored by the deployed file and by the 16-bit one, to say what quantization changes


def prefer(run: Run) -> Summary:
    """Write scores.jsonl (one row a rationale) and questions.jsonl (one row a question)."""
    config, student, closed = run.config.prefer, run.config.student, run.task.answer.closed
    usable = sum(row["usable"] for row in run.read("elicit", "rationales.jsonl"))
    racing = is_raced(config, usable, len(run.read("calibrate", "preference_set.jsonl")))
    level = config.length_free and closed

    def body(stage: Stage) -> Summary:
        questions = {row["id"]: row for row in run.read("elicit", "questions.jsonl")}
        drafts = [row for row in run.read("elicit", "rationales.jsonl") if row["usable"]]
        examples = [Example(r["input"], r["target"]) for r in run.read("calibrate", "preference_set.jsonl")]
        shots = [Worked(questions[d["question"]]["input"], d["text"]) for d in drafts]
        which = [d["question"] for d in drafts]
        share = config.race_share if racing else 1.0
        engine = scoring_engine(run, round(share * len(drafts) * len(examples)))
        lengths = [engine.count_tokens(f" {draft['text'].strip()}") for draft in drafts]
        tokens = np.array(lengths, dtype=float)
        if racing:
            raced = race_scores(run, engine, shots, which, examples, tokens if level else None)
            scores = raced.scores
        else:
            by = by_writing if config.score == "accuracy" else by_probability
            raced, scores = None, by(run, engine, shots, examples)
        plain = np.array([score.free if config.bias_free and closed else score.value for score in scores])
        by_length = length_share(plain, tokens) if level else np.zeros(len(plain))
        rows = [_row(run, *one) for one in zip(drafts, scores, plain, by_length, lengths, strict=True)]
        if raced is not None:
            for row, items, error in zip(rows, raced.items, raced.errors, strict=True):
                row |= {"items": items, "standard_error": round(error, 6)}
        means = _question_means(rows, questions)
        stage.write("scores.jsonl", rows)
        stage.write("questions.jsonl", means)
        return (
            _summary(rows, plain, len(examples))
            | {"engine": f"{engine.identity.kind} {engine.identity.quantization}".strip()}
            | _race_summary(raced, config.race_error)
            | _deployed_summary(run, engine, shots, which, examples)
        )

    unused = set() if config.student_file else {"student_file"}
    unused |= {"engine"} if config.engine == "auto" else set()
    unused |= set() if closed else {"length_free"}
    unused |= set() if racing else {"race_share", "race_error"}
    inputs = {
        # A key that is not used must not be an input: older runs were made without it.
        "prefer": config.model_dump(mode="json", exclude=unused | {"race"}),
        "student": run.identity(student),
        "data": run.outputs("elicit", "calibrate"),
        **run.deploy_inputs(),
    }
    return run.stage("prefer", inputs, body, _say)


def _row(run: Run, draft: Row, score: Score, plain: float, by_length: float, tokens: int) -> Row:
    """Return a row of scores.jsonl: `plain` orders drafts before what length explains of it is taken out."""
    cost, budget = _in_time(run, tokens)
    return {
        "question": draft["question"],
        "technique": draft["technique"],
        "score": round(cost(float(plain - by_length)), 6),
        "measured": round(score.value, 6),
        "bias_free": round(score.free, 6),
        "bias": round(score.bias, 6),
        "length": round(float(by_length), 6),
        "accuracy": None if np.isnan(score.accuracy) else round(score.accuracy, 6),
        "tokens": draft["tokens"],
        "text": draft["text"],
        **budget,
    }


def _in_time(run: Run, tokens: int) -> tuple[Callable[[float], float], Row]:
    """Return what a draft of so many of the student's tokens pays, and what its row says; nothing without a budget."""
    if run.budget is None:
        return (lambda score: score), {}
    most = run.budget.answer_tokens
    row = {"student_tokens": tokens, "over_budget": tokens > most}
    if run.config.prefer.score == "accuracy":  # there the student itself was cut off
        return (lambda score: score), row
    log = not run.task.answer.closed
    return (lambda score: pay(score, tokens, most, log=log)), row


def _question_means(rows: Sequence[Row], questions: dict[str, Row]) -> list[Row]:
    by_question: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_question[row["question"]].append(row["score"])
    return [
        {
            "id": key,
            "input": questions[key]["input"],
            "target": questions[key]["label"],
            "score": round(float(np.mean(values)), 6),
            "rationales": len(values),
        }
        for key, values in by_question.items()
    ]


def _summary(rows: Sequence[Row], plain: np.ndarray[Any, Any], k: int) -> Summary:
    """Return what the scores are like; `plain` ``[d]`` are those before length was taken out."""
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


def _race_summary(raced: Raced | None, error: float) -> Summary:
    if raced is None:
        return {}
    return {
        "race": {
            "measured": raced.cells,
            "of": raced.of_cells,
            "rounds": raced.rounds,
            "open": raced.open,
            "error": error,
        }
    }


def _deployed_summary(
    run: Run, engine: Engine, shots: Sequence[Worked], question: Sequence[str], examples: Sequence[Example]
) -> Summary:
    """Say how a sample of drafts is preferred by the deployed file and by the student with 16 bits."""
    chosen = sample_drafts(question, _COMPARED_DRAFTS) if run.config.prefer.student_file else []
    if not chosen:
        return {}
    some = [shots[draft] for draft in chosen]
    full = item_scores(run, run.engine(run.config.student), some, examples)
    deployed = item_scores(run, engine, some, examples)
    return {"deployed": compare(full, deployed, [question[draft] for draft in chosen]).as_dict()}


def _correlation(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float | None:
    found = pearson(a, b)
    return None if found is None else round(found, 4)


def _say(summary: Summary) -> str:
    against = summary["measured_against_bias"]
    trap = "" if against is None else f"; r with the induced answer bias {against:+.2f}"
    long = summary.get("over_budget")
    # A stage that an earlier version finished does not say which engine scored.
    floats = summary.get("engine", "").partition("transformers ")[2]
    rest = f"; in {floats}" if floats else ""
    rest += f"; {long} longer than the device has time for" if long else ""
    if race := summary.get("race"):
        share = race["measured"] / race["of"]
        rest += (
            f"; raced: {race['measured']} of {race['of']} scores measured ({share:.0%}), {race['open']} drafts' "
            f"places open at {race['error']:.0%} risk"
        )
    if deployed := summary.get("deployed"):
        kept = ", ".join(
            f"{end} kept in {share:.0%}"
            for end, share in (("best", deployed["best_kept"]), ("worst", deployed["worst_kept"]))
        )
        rest += f"; against 16 bits: {kept} of {deployed['questions']} questions"
    return (
        f"{summary['drafts']} drafts × {summary['k']} questions, score {summary['mean']:.3f} ± {summary['sd']:.3f}"
        + trap
        + rest
    )

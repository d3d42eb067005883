"""Step 2, calibrate: the preference set, found with item response theory (paper, section 3.2).

Several models with several numbers of few-shot examples answer the validation questions; a
two-parameter logistic fit says which questions discriminate strong respondents from weak ones.
Answers are constrained: a respondent that merely lacks the format would otherwise look weak
everywhere. For closed answer sets the preference set holds every answer equally often, or a score on
it would partly measure answer bias (docs/preference-scores.md).
"""

from __future__ import annotations

import random

import numpy as np

from arte_edge.distill.config import ModelConfig, RunConfig
from arte_edge.distill.evaluation import respondent_answers
from arte_edge.distill.irt import fit_2pl, top_k
from arte_edge.distill.prompts import Shot, answer_shots
from arte_edge.distill.run_context import RunContext, Summary
from arte_edge.runtimes.loader import is_server


def calibrate(run: RunContext) -> Summary:
    """Write matrix.jsonl (one row per respondent) and preference_set.jsonl (one row per question)."""
    config = run.config.calibrate
    items = run.task.validation[: config.items]
    models = respondents(run.config, closed=run.task.answer.closed)
    inputs = {
        "calibrate": config.model_dump(mode="json"),
        "models": [run.identity(model) for model in models],
        "task": run.task.sha256,
    }
    with run.stage("calibrate", inputs, _describe) as stage:
        if stage.todo:
            rows, matrix = [], []
            for model in models:
                engine = run.engine(model)
                for n_shot in config.shots:
                    shots, what = _shots(run, n_shot), f"{model.model} {n_shot}-shot"
                    right = respondent_answers(run, engine, model, items, shots, what).right
                    rows.append({"model": model.model, "shots": len(shots), "right": right.astype(int).tolist()})
                    matrix.append(right)
            params = fit_2pl(np.array(matrix, dtype=float))
            groups = [item.target for item in items] if run.task.answer.closed else None
            chosen = top_k(params, min(config.k, len(items)), groups)
            stage.write("matrix.jsonl", rows)
            stage.write(
                "preference_set.jsonl",
                (
                    {
                        "input": items[i].input,
                        "target": items[i].target,
                        "discrimination": round(float(params.discrimination[i]), 4),
                        "difficulty": round(float(params.difficulty[i]), 4),
                    }
                    for i in chosen
                ),
            )
            stage.finish(
                {
                    "respondents": len(matrix),
                    "items": len(items),
                    "k": len(chosen),
                    "accuracy_low": float(min(row.mean() for row in matrix)),
                    "accuracy_high": float(max(row.mean() for row in matrix)),
                    "discrimination_chosen": float(params.discrimination[chosen].mean()),
                    "discrimination_all": float(params.discrimination.mean()),
                }
            )
    return stage.summary


def respondents(config: RunConfig, *, closed: bool) -> list[ModelConfig]:
    """Return the models that answer the validation questions."""
    extra = [ModelConfig(model=name) for name in config.calibrate.models]
    # A server may not return log-probabilities; the students and extra models do the ranking then.
    teachers = [] if is_server(config.teacher.model) and closed else [config.teacher]
    return [*teachers, config.student, *extra]


def _shots(run: RunContext, n: int) -> list[Shot]:
    """Return `n` seeds sampled for this number of shots, so that respondents differ in more than length."""
    seeds = list(run.task.seed)
    random.Random(f"{run.config.seed}/calibrate/{n}").shuffle(seeds)
    return answer_shots(seeds, n)


def _describe(summary: Summary) -> str:
    ratio = summary["discrimination_chosen"] / summary["discrimination_all"]
    return (
        f"{summary['k']} of {summary['items']} questions, which discriminate {ratio:.2f} times as sharply as all do on "
        f"average (1.00: no better than a random choice), from {summary['respondents']} respondents"
    )

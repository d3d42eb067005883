"""Step 2, calibrate: the preference set, found with item response theory (paper, section 3.2).

Several models under several numbers of shots answer the validation questions; a
two-parameter logistic fit says which questions tell strong respondents from weak
ones. Answers are forced: a respondent that merely lacks the format would otherwise
look weak everywhere. For closed answer sets the preference set holds every answer
equally often, or a score on it would partly measure answer bias (docs/preference-set.md).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from arte_edge.distill.answering import forced
from arte_edge.distill.config import ModelConfig
from arte_edge.distill.irt import fit_2pl, top_k
from arte_edge.distill.prompts import Worked, answer_shots
from arte_edge.distill.run import Run, Summary
from arte_edge.runtimes.loader import is_server
from arte_edge.store import Stage

__all__ = ["calibrate"]


def calibrate(run: Run) -> Summary:
    """Write matrix.jsonl (one row a respondent) and preference_set.jsonl (one row a question)."""
    config = run.config.calibrate
    items = run.task.validation[: config.items]
    models = _respondents(run)

    def body(stage: Stage) -> Summary:
        rows, matrix = [], []
        for model in models:
            engine = run.engine(model)
            for shots in config.shots:
                answered = forced(
                    run, engine, model, items, _shots(run, shots), f"{model.model} {shots}-shot"
                )
                rows.append(
                    {"model": model.model, "shots": shots, "right": answered.right.astype(int).tolist()}
                )
                matrix.append(answered.right)
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
        picked = params.discrimination[chosen]
        return {
            "respondents": len(matrix),
            "items": len(items),
            "k": len(chosen),
            "accuracy_low": float(min(row.mean() for row in matrix)),
            "accuracy_high": float(max(row.mean() for row in matrix)),
            "discrimination_chosen": float(picked.mean()),
            "discrimination_all": float(params.discrimination.mean()),
        }

    inputs: dict[str, Any] = {
        "calibrate": config.model_dump(mode="json"),
        "models": [run.identity(model) for model in models],
        "task": run.task.sha256,
    }
    return run.stage("calibrate", inputs, body, _say)


def _respondents(run: Run) -> list[ModelConfig]:
    extra = [ModelConfig(model=name) for name in run.config.calibrate.models]
    # A server may sell no log-probabilities; the students and extra models do the ranking then.
    teachers = [] if is_server(run.config.teacher.model) and run.task.answer.closed else [run.config.teacher]
    return [*teachers, run.config.student, *extra]


def _shots(run: Run, n: int) -> list[Worked]:
    """Return `n` seeds drawn for this number of shots, so that respondents differ in more than length."""
    seeds = list(run.task.seed)
    random.Random(f"{run.config.seed}/calibrate/{n}").shuffle(seeds)
    return answer_shots(seeds, n)


def _say(summary: Summary) -> str:
    return (
        f"{summary['k']} of {summary['items']} questions by discrimination "
        f"({summary['discrimination_chosen']:.2f} against {summary['discrimination_all']:.2f} on average), "
        f"from {summary['respondents']} respondents"
    )

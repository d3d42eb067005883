"""The last stage: base student, tuned student and teacher on the untouched test split.

Every figure comes with n and a 95 % Wilson interval, base against tuned with the
exact McNemar test. The base student is also asked with its answer forced: what it
gains by that alone is format, and the table says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from arte_edge.distill.answering import Answered, forced, written
from arte_edge.distill.check import chance
from arte_edge.distill.prompts import teacher_shots
from arte_edge.distill.rationales import rationale_prompt, rationale_sampling
from arte_edge.distill.run import Run, Summary
from arte_edge.models.local import LocalModel
from arte_edge.runtimes.completion import Engine, Request
from arte_edge.stats import format_share, mcnemar, wilson
from arte_edge.store import Stage
from arte_edge.tasks.answers import extract, matches
from arte_edge.tasks.task import Example

__all__ = ["evaluate"]


def evaluate(run: Run, tuned: LocalModel) -> Summary:
    """Write answers.jsonl; the summary holds a row for each model and setting, and the paired tests."""
    config = run.config.evaluate

    def body(stage: Stage) -> Summary:
        examples = run.task.load_test()
        examples = examples[: config.limit] if config.limit else examples
        base_engine = run.engine(run.config.student)
        tuned_engine = run.engine_with(tuned, None, run.config.student)
        results: dict[tuple[str, str], Answered] = {}
        for shots in config.shots:
            setting = f"{shots}-shot"
            results["base student", setting] = _write(run, base_engine, examples, shots, f"base {setting}")
            results["tuned student", setting] = _write(run, tuned_engine, examples, shots, f"tuned {setting}")
        student = run.config.student
        results["base student", "answer forced"] = forced(
            run, base_engine, student, examples, (), "base, answer forced"
        )
        results["tuned student", "answer forced"] = forced(
            run, tuned_engine, student, examples, (), "tuned, answer forced"
        )
        if config.teacher:
            results["teacher", f"{run.config.teacher.shots} worked"] = _teacher(run, examples)
        stage.write("answers.jsonl", _answers(examples, results))
        return _summary(run, examples, results)

    inputs = {
        "evaluate": config.model_dump(mode="json"),
        "elicit": [run.config.elicit.rationale_tokens, run.config.elicit.grammar],
        "teacher": run.identity(run.config.teacher),
        "student": run.identity(run.config.student),
        "tuned": tuned.sha256,
        "task": run.task.sha256,
        **run.deploy_inputs(),
    }
    return run.stage("evaluate", inputs, body, _say)


def _write(run: Run, engine: Engine, examples: tuple[Example, ...], shots: int, what: str) -> Answered:
    worked = teacher_shots(run.task, shots)
    tokens = run.most_tokens(run.config.evaluate.answer_tokens)
    return written(run, engine, run.config.student, examples, worked, tokens, what)


def _teacher(run: Run, examples: tuple[Example, ...]) -> Answered:
    teacher = run.config.teacher
    engine = run.engine(teacher)
    requests = [Request(rationale_prompt(run, engine, teacher, e.input, None)) for e in examples]
    sampling = rationale_sampling(run, engine, run.config.elicit.rationale_tokens)
    completions = run.calls.complete(engine, requests, sampling, "teacher")
    kind = run.task.answer
    answers = [extract(c.text, kind) for c in completions]
    right = [matches(a, e.target, kind) for a, e in zip(answers, examples, strict=True)]
    return Answered(answers, np.array(right, dtype=np.bool_))


def _answers(examples: tuple[Example, ...], results: dict[tuple[str, str], Answered]) -> list[dict[str, Any]]:
    return [
        {
            "input": example.input,
            "target": example.target,
            **{f"{who}, {setting}": answered.answers[i] for (who, setting), answered in results.items()},
        }
        for i, example in enumerate(examples)
    ]


def _summary(
    run: Run, examples: tuple[Example, ...], results: dict[tuple[str, str], Answered]
) -> dict[str, Any]:
    rows = []
    for (who, setting), answered in results.items():
        interval = wilson(int(answered.right.sum()), len(examples))
        rows.append(
            {
                "model": who,
                "setting": setting,
                "n": len(examples),
                "right": int(answered.right.sum()),
                "accuracy": round(answered.accuracy, 4),
                "low": round(interval.low, 4),
                "high": round(interval.high, 4),
            }
        )
    paired = {}
    for who, setting in results:
        if who != "base student":
            continue
        test = mcnemar(results[who, setting].right, results["tuned student", setting].right)
        paired[setting] = {
            "gained": test.only_b,
            "lost": test.only_a,
            "difference": round(test.difference, 4),
            "low": round(test.low, 4),
            "high": round(test.high, 4),
            "p_value": test.p_value,
        }
    zero = f"{run.config.evaluate.shots[0]}-shot"
    share = format_share(
        results["base student", zero].accuracy,
        results["base student", "answer forced"].accuracy,
        results["tuned student", zero].accuracy,
    )
    return {
        "rows": rows,
        "paired": paired,
        "format_share": None if share is None else round(share, 4),
        "chance": round(chance(run, examples), 4),
        "partial": bool(run.config.evaluate.limit) and run.config.evaluate.limit < len(run.task.test_keys()),
        **run.deploy_inputs(),
    }


def _say(summary: Summary) -> str:
    by = {(row["model"], row["setting"]): row["accuracy"] for row in summary["rows"]}
    first = summary["rows"][0]["setting"]
    return (
        f"{summary['rows'][0]['n']} test examples, {first}: {by['base student', first]:.0%} before, "
        f"{by['tuned student', first]:.0%} after"
    )

"""Before the first step: does the teacher outperform the student on this task?

A teacher that cannot do the task cannot teach it. Both answer validation examples: the teacher with
the naive prompt with which it will generate training data, the student as it is. The bar is the student
with constrained answers, so that a student that merely lacks the format does not count as ignorant.
"""

from __future__ import annotations

from typing import Any

from arte_edge.distill.evaluation import (
    constrained_answers,
    generated_answers,
    majority_baseline,
    teacher_answers,
)
from arte_edge.distill.run_context import RunContext, Summary
from arte_edge.errors import StoppedEarly
from arte_edge.stats import mcnemar, wilson

__all__ = ["check"]


def check(run: RunContext, *, force: bool) -> Summary:
    """Compare teacher and student on validation examples.

    Raises StoppedEarly: the teacher does not outperform the student, or is near chance, and not `force`.
    """
    examples = run.task.validation[: run.config.check.examples]
    with run.stage("check", _inputs(run), _describe) as stage:
        if stage.todo:
            student, n = run.config.student, len(examples)
            engine, tokens = run.engine(student), run.config.evaluate.answer_tokens
            teacher = teacher_answers(run, examples)
            as_is = generated_answers(run, engine, student, examples, (), tokens, "student")
            constrained = constrained_answers(run, engine, student, examples, (), "student, constrained")
            answers = zip(examples, teacher.texts, as_is.answers, constrained.answers, strict=True)
            stage.write(
                "answers.jsonl",
                (
                    {"input": e.input, "target": e.target, "teacher": t, "student": s, "forced": c}
                    for e, t, s, c in answers
                ),
            )
            stage.finish(
                {
                    "n": n,
                    "teacher": _accuracy(int(teacher.right.sum()), n),
                    "student": _accuracy(int(as_is.right.sum()), n),
                    "student_forced": _accuracy(int(constrained.right.sum()), n),
                    "chance": majority_baseline(run, examples),
                    "p_value": mcnemar(teacher.right, constrained.right).p_value,
                }
            )
    if (problem := _problem(stage.summary)) is not None:
        run.reporter.warn(problem)
        if not force:
            raise StoppedEarly(
                "Stopped before the first step: this teacher would not improve this student",
                "Use a stronger teacher, give it more few-shot examples (teacher.shots), or continue with --force.",
            )
    return stage.summary


def _inputs(run: RunContext) -> dict[str, Any]:
    return {
        "check": run.config.check.model_dump(mode="json"),
        "grammar": run.config.elicit.grammar,
        "tokens": [run.config.elicit.rationale_tokens, run.config.evaluate.answer_tokens],
        "teacher": run.identity(run.config.teacher),
        "student": run.identity(run.config.student),
        "task": run.task.sha256,
    }


def _accuracy(right: int, n: int) -> dict[str, float]:
    interval = wilson(right, n)
    return {"accuracy": right / n, "low": interval.low, "high": interval.high}


def _problem(summary: Summary) -> str | None:
    teacher, student = summary["teacher"], summary["student_forced"]
    n = summary["n"]
    if teacher["low"] <= summary["chance"]:
        return (
            f"the teacher is near chance: {teacher['accuracy']:.0%} right (95 % interval "
            f"{teacher['low']:.0%} to {teacher['high']:.0%}, n = {n}); the majority baseline is {summary['chance']:.0%}"
        )
    # The question has a direction, is the teacher better, so half of the two-sided p answers it.
    one_sided = summary["p_value"] / 2
    if teacher["accuracy"] <= student["accuracy"] or one_sided >= 0.05:
        return (
            f"the teacher does not significantly outperform the student: {teacher['accuracy']:.0%} against "
            f"{student['accuracy']:.0%} with constrained answers (n = {n}, one-sided paired p = {one_sided:.2g})"
        )
    return None


def _describe(summary: Summary) -> str:
    teacher = summary["teacher"]
    return (
        f"teacher {teacher['accuracy']:.0%} right ({teacher['low']:.0%} to {teacher['high']:.0%}), student "
        f"{summary['student']['accuracy']:.0%}, {summary['student_forced']['accuracy']:.0%} constrained "
        f"(one-sided p = {summary['p_value'] / 2:.2g}); majority baseline {summary['chance']:.0%}, n = {summary['n']}"
    )

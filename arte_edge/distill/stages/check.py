"""Before the first step: what is this teacher good for?

Three answer validation examples: the teacher, as it would label training data; the student as it is; and the student
trained on the user's own labels (`stages.own_labels`), which is what the user has without any teacher. A teacher
that is clearly better than the last one labels. Any other knows the task less well than the user's labels do; what
it has is language, so it is told an answer and writes inputs for it, and its own answer to them is a filter at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from arte_edge.distill.evaluation import (
    Predictions,
    majority_baseline,
    student_answers,
    student_choices,
    teacher_answers,
)
from arte_edge.distill.run_context import Role, RunContext, Summary
from arte_edge.distill.stages.own_labels import own_labels_student
from arte_edge.errors import StoppedEarly
from arte_edge.stats import mcnemar, wilson


def check(run: RunContext, *, force: bool) -> Summary:
    """Compare teacher, student and own-labels student on validation examples; set the teacher's role of `run`.

    Raises StoppedEarly: this teacher cannot help this student on this task, and not `force`.
    """
    examples = run.task.validation[: run.config.check.examples]
    with run.stage("check", _inputs(run), _describe) as stage:
        if stage.todo:
            student, how = run.config.student, run.asking("answer")
            teacher, setting = teacher_answers(run, examples)
            as_is = student_answers(run, run.engine(student), how, examples, "student")
            constrained = student_choices(run, run.engine(student), how, examples, "student, constrained")
            own = None
            if run.config.check.own_labels and run.task.seed:
                trained = own_labels_student(run, run.task.seed, stage.folder / "own-labels")
                engine = run.engine_with(trained, None, student)
                own = student_answers(run, engine, how, examples, "own labels")
            stage.write(
                "answers.jsonl",
                (
                    {
                        "input": e.input,
                        "target": e.target,
                        "teacher": teacher.answers[i],
                        "student": as_is.answers[i],
                        "constrained": constrained.answers[i],
                        **({} if own is None else {"own_labels": own.answers[i]}),
                    }
                    for i, e in enumerate(examples)
                ),
            )
            stage.finish(
                {
                    "n": len(examples),
                    "teacher": _accuracy(teacher) | {"setting": setting},
                    "student": _accuracy(as_is),
                    "student_constrained": _accuracy(constrained),
                    "own_labels": None if own is None else _accuracy(own) | {"rows": len(run.task.seed)},
                    "chance": majority_baseline(run, examples),
                    "p_student": one_sided(constrained, teacher),
                    "p_own_labels": None if own is None else one_sided(own, teacher),
                    **_role(run, teacher, own),
                }
            )
    run.role = stage.summary["role"]
    if (problem := _problem(stage.summary)) is not None:
        run.reporter.warn(problem)
        if not force:
            raise StoppedEarly(
                "Stopped before the first step: this teacher would not improve this student",
                "Use a stronger teacher, give it more few-shot examples (teacher.shots), or continue with --force. "
                f"The student of your own labels is {run.folder / 'check' / 'own-labels'}.",
            )
    return stage.summary


def _inputs(run: RunContext) -> dict[str, Any]:
    return {
        "check": run.config.check.model_dump(mode="json"),
        "elicit": [run.config.elicit.grammar, run.config.elicit.opinion_shots, run.config.elicit.by_label],
        "tokens": [run.config.elicit.rationale_tokens, run.config.evaluate.answer_tokens],
        "teacher": run.identity(run.config.teacher),
        "role": run.config.teacher.role,
        "student": run.identity(run.config.student),
        "tune": [run.config.tune.learning_rate, run.config.tune.epochs],
        "task": run.task.sha256,
        **run.budget_inputs(),
    }


def one_sided(a: Predictions, b: Predictions) -> float:
    """Return the p-value of `b` being no better than `a` on the same examples (exact McNemar test)."""
    p = mcnemar(a.right, b.right).p_value / 2
    return p if b.accuracy > a.accuracy else 1 - p


def _accuracy(answered: Predictions) -> dict[str, float]:
    n = len(answered.right)
    interval = wilson(int(np.sum(answered.right)), n)
    return {"accuracy": answered.accuracy, "low": interval.low, "high": interval.high}


def _role(run: RunContext, teacher: Predictions, own: Predictions | None) -> dict[str, str]:
    """Return the teacher's role and the reason for it."""

    def is_(role: Role, why: str) -> dict[str, str]:
        return {"role": role, "why": why}

    if run.config.teacher.role != "auto":
        return is_(run.config.teacher.role, f"teacher.role = {run.config.teacher.role}")
    if own is None:
        return is_("labels", "no student of your own labels to compare with")
    p, than = one_sided(own, teacher), f"own labels alone ({teacher.accuracy:.0%} against {own.accuracy:.0%}"
    if p < 0.05:
        return is_("labels", f"it is better than the student of your {than}, p = {p:.2g})")
    not_better = f"it is not clearly better than the student of your {than}, p = {p:.2g})"
    if run.by_label:
        return is_("inputs", not_better)
    return is_("labels", f"{not_better}, but inputs cannot be written for a given answer of this task")


def _problem(summary: Summary) -> str | None:
    """Return why the teacher cannot help, None if it can. One that writes inputs needs language, not accuracy."""
    if summary["role"] == "inputs":
        return None
    teacher, student, own = summary["teacher"], summary["student_constrained"], summary["own_labels"]
    n = summary["n"]
    if teacher["low"] <= summary["chance"]:
        return (
            f"the teacher is near chance: {teacher['accuracy']:.0%} right (95 % interval "
            f"{teacher['low']:.0%} to {teacher['high']:.0%}, n = {n}); the majority baseline is {summary['chance']:.0%}"
        )
    if summary["p_student"] >= 0.05:
        return (
            f"the teacher does not significantly outperform the student: {teacher['accuracy']:.0%} against "
            f"{student['accuracy']:.0%} with constrained answers (n = {n}, one-sided paired p = "
            f"{summary['p_student']:.2g})"
        )
    if own is not None and teacher["accuracy"] <= own["accuracy"]:
        return (
            f"the student of your own labels is as good as the teacher: {own['accuracy']:.0%} against "
            f"{teacher['accuracy']:.0%} (n = {n})"
        )
    return None


_DOES = {
    "labels": "the teacher labels",
    "inputs": "the teacher writes inputs for given answers and does not label",
}


def _describe(summary: Summary) -> str:
    teacher, own = summary["teacher"], summary["own_labels"]
    yours = "" if own is None else f", trained on your {own['rows']} labels {own['accuracy']:.0%}"
    return (
        f"teacher {teacher['accuracy']:.0%} right ({teacher['low']:.0%} to {teacher['high']:.0%}), student "
        f"{summary['student']['accuracy']:.0%}, {summary['student_constrained']['accuracy']:.0%} constrained{yours}; "
        f"majority baseline {summary['chance']:.0%}, n = {summary['n']}. {_DOES[summary['role']]}: {summary['why']}"
    )

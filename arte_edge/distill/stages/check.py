"""Before the first step: what is this teacher good for? And the control that says it, the student of own labels.

Three answer validation examples: the teacher, as it would label training data; the student as it is; and the student
trained on the user's own labels (`own_labels_student`), which is what the user has without any teacher. A teacher
that is clearly better than the last one labels. Any other knows the task less well than the user's labels do; what
it has is language, so it is told an answer and writes inputs for it, and its own answer to them is a filter at most.

Every run trains that control: here on the seed rows, and in the evaluation on seed and validation rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arte_edge.asking.form import Asking
from arte_edge.checkpoint import write_chat_template
from arte_edge.distill.evaluation import (
    Predictions,
    majority_baseline,
    student_answers,
    student_choices,
    student_prompts,
    teacher_answers,
)
from arte_edge.distill.run_context import Role, Row, RunContext, Summary
from arte_edge.distill.train.common import SftSettings
from arte_edge.distill.train.sft import train_sft
from arte_edge.errors import StoppedEarly
from arte_edge.models.resolve import LocalModel, tuned_student
from arte_edge.stats import mcnemar, wilson
from arte_edge.tasks.task import Example

_BATCH = 4
_STEPS, _MOST_EPOCHS = 80, 10.0  # forty rows are seen eight times
_RATE = 1e-4  # the paper's 2e-5 learns little from forty rows


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


_DOES = {"labels": "the teacher labels", "inputs": "the teacher writes inputs for given answers and does not label"}


def _describe(summary: Summary) -> str:
    teacher, own = summary["teacher"], summary["own_labels"]
    yours = "" if own is None else f", trained on your {own['rows']} labels {own['accuracy']:.0%}"
    return (
        f"teacher {teacher['accuracy']:.0%} right ({teacher['low']:.0%} to {teacher['high']:.0%}), student "
        f"{summary['student']['accuracy']:.0%}, {summary['student_constrained']['accuracy']:.0%} constrained{yours}; "
        f"majority baseline {summary['chance']:.0%}, n = {summary['n']}. {_DOES[summary['role']]}: {summary['why']}"
    )


def training_rows(
    run: RunContext, how: Asking, examples: Sequence[Example], rationales: Sequence[str] = ()
) -> list[Row]:
    """Return training rows: what the student's chat template makes of each input, and the answer it shall give."""
    prompts = student_prompts(run, run.engine(run.config.student), how, examples)
    return [
        {"prompt": prompt, "completion": how.completion(example.target, rationale)}
        for prompt, example, rationale in zip(prompts, examples, rationales or [""] * len(examples), strict=True)
    ]


def train_briefly(run: RunContext, how: Asking, rows: Sequence[Row], out: Path, what: str) -> LocalModel:
    """Train the student on few `rows` in the folder `out`; return it in the form that `stages.tune` gives its own.

    Few rows are seen several times: up to ten epochs, until there were eighty steps.
    """
    base, student = run.local(run.config.student), run.config.student
    template = run.asked(run.engine(student), how).chat_template
    gguf = out.with_name(f"{out.name}-F16.gguf")
    epochs = min(max(run.config.tune.epochs, _STEPS * _BATCH / len(rows)), _MOST_EPOCHS)
    rate = max(run.config.tune.learning_rate, _RATE)
    settings = SftSettings(learning_rate=rate, batch_size=_BATCH, epochs=epochs, seed=run.config.seed)
    with run.training(what) as progress:
        train_sft(run.checkpoint(student), rows, out, settings, progress=progress)
    write_chat_template(out, template)
    return tuned_student(base, out, gguf)


def own_labels_student(run: RunContext, examples: Sequence[Example], out: Path) -> LocalModel:
    """Train the student on labelled examples alone, answers only, in the folder `out`."""
    how = run.asking("answer")
    rows = training_rows(run, how, examples)
    run.take_training(out)
    return train_briefly(run, how, rows, out, f"training on {len(rows)} own labels")

"""Before anything is spent: does the teacher know the task, and better than the student?

A teacher that cannot do the task cannot teach it. Both answer validation examples:
the teacher under the naive prompt with which it will write the training data, the
student as it is. The bar is the student with its answer forced, so that a student
that merely lacks the format is not taken for ignorant.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from arte_edge.distill.answering import forced, written
from arte_edge.distill.rationales import rationale_prompt, rationale_sampling
from arte_edge.distill.run import Run, Summary
from arte_edge.errors import InputError, StoppedEarly
from arte_edge.runtimes.completion import Request
from arte_edge.stats import mcnemar, wilson
from arte_edge.store import Stage
from arte_edge.tasks.answers import extract, matches
from arte_edge.tasks.task import Example

__all__ = ["check"]

_FEWEST = 20  # below this an interval is wider than any difference worth knowing


def check(run: Run, *, anyway: bool) -> Summary:
    """Compare teacher and student on validation examples.

    Raises:
        InputError: the validation set is too small.
        StoppedEarly: the teacher is not clearly above the student, or near chance, and not `anyway`.
    """
    examples = run.task.validation[: run.config.check.examples]
    if len(examples) < min(_FEWEST, run.config.check.examples):
        raise InputError(
            f"Task '{run.task.name}': {len(examples)} validation examples are too few to tell a good teacher "
            f"from a bad one; {_FEWEST} are the least, 100 are good",
            "Label more examples in validation.jsonl.",
        )

    def body(stage: Stage) -> Summary:
        teacher, student = run.config.teacher, run.config.student
        engine = run.engine(teacher)
        prompts = [rationale_prompt(run, engine, teacher, e.input, None) for e in examples]
        sampling = rationale_sampling(run, engine, run.config.elicit.rationale_tokens)
        completions = run.calls.complete(engine, [Request(p) for p in prompts], sampling, "teacher")
        kind = run.task.answer
        taught = np.array(
            [
                matches(extract(c.text, kind), e.target, kind)
                for c, e in zip(completions, examples, strict=True)
            ]
        )
        pupil = run.engine(student)
        tokens = run.config.evaluate.answer_tokens
        as_is = written(run, pupil, student, examples, (), tokens, "student")
        pushed = forced(run, pupil, student, examples, (), "student, answer forced")
        test = mcnemar(taught, pushed.right)
        stage.write(
            "answers.jsonl",
            (
                {"input": e.input, "target": e.target, "teacher": c.text, "student": s, "forced": f}
                for e, c, s, f in zip(examples, completions, as_is.answers, pushed.answers, strict=True)
            ),
        )
        return {
            "n": len(examples),
            "teacher": _share(int(taught.sum()), len(examples)),
            "student": _share(int(as_is.right.sum()), len(examples)),
            "student_forced": _share(int(pushed.right.sum()), len(examples)),
            "chance": chance(run, examples),
            "p_value": test.p_value,
        }

    summary = run.stage("check", _inputs(run), body, _say)
    if (why := _complaint(summary)) is not None:
        run.reporter.warn(why)
        if not anyway:
            raise StoppedEarly(
                "Stopped before anything was spent: the teacher would not teach this student",
                "Take a stronger teacher, show it more worked examples (teacher.shots), or go on with --anyway.",
            )
    return summary


def chance(run: Run, examples: tuple[Example, ...]) -> float:
    """Return the accuracy of always giving the most frequent answer, or of guessing among the options."""
    top = Counter(example.target for example in examples).most_common(1)[0][1] / len(examples)
    if not run.task.answer.closed:
        return top
    guess = float(np.mean([1 / len(run.task.answer.options(example.input)) for example in examples]))
    return max(top, guess)


def _inputs(run: Run) -> dict[str, Any]:
    return {
        "check": run.config.check.model_dump(mode="json"),
        "grammar": run.config.elicit.grammar,
        "tokens": [run.config.elicit.rationale_tokens, run.config.evaluate.answer_tokens],
        "teacher": run.identity(run.config.teacher),
        "student": run.identity(run.config.student),
        "task": run.task.sha256,
    }


def _share(right: int, n: int) -> dict[str, float]:
    interval = wilson(right, n)
    return {"accuracy": right / n, "low": interval.low, "high": interval.high}


def _complaint(summary: Summary) -> str | None:
    teacher, pupil = summary["teacher"], summary["student_forced"]
    n = summary["n"]
    if teacher["low"] <= summary["chance"]:
        return (
            f"the teacher is near chance: {teacher['accuracy']:.0%} right (95 % interval "
            f"{teacher['low']:.0%} to {teacher['high']:.0%}, n = {n}); guessing gives {summary['chance']:.0%}"
        )
    # The question has a direction, is the teacher better, so half of the two-sided p answers it.
    one_sided = summary["p_value"] / 2
    if teacher["accuracy"] <= pupil["accuracy"] or one_sided >= 0.05:
        return (
            f"the teacher is not clearly above the student: {teacher['accuracy']:.0%} against "
            f"{pupil['accuracy']:.0%} with the student's answer forced (n = {n}, one-sided paired p = {one_sided:.2g})"
        )
    return None


def _say(summary: Summary) -> str:
    return (
        f"teacher {summary['teacher']['accuracy']:.0%} right, student {summary['student']['accuracy']:.0%} "
        f"({summary['student_forced']['accuracy']:.0%} with the answer forced), chance {summary['chance']:.0%}, "
        f"n = {summary['n']}"
    )

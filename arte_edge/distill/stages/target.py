"""What the student learns to write: the answer alone, the answer and then reasons, or reasons and then the answer.

Small students often learn a label better without reasoning in front of it (arXiv 2406.14511), and a label is a few
tokens where reasoning is forty; but where the steps are the task, they are needed. So a short trial on the
validation split decides: one student a form, trained on the same few rows. The answer alone is taken unless another
form is clearly better, for it is the cheapest on a device.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arte_edge.asking.form import FORMS, Form
from arte_edge.distill.evaluation import Predictions, student_answers
from arte_edge.distill.generation.rationales import generate_rationales
from arte_edge.distill.run_context import Row, RunContext, Summary
from arte_edge.distill.stages.check import one_sided, train_briefly, training_rows
from arte_edge.tasks.answers import matches
from arte_edge.tasks.task import Example

TRIAL_EXAMPLES = 100  # of the validation split
FEWEST_REASONS = 8  # rows with reasons; fewer teach no form
TRIAL_ROWS = 120  # rows of a trial


def target(run: RunContext) -> Summary | None:
    """Set the student's answer form of `run`, before the teacher writes anything that depends on it.

    None where nothing had to be found out yet: the form is configured, or the task needs reasons anyway and the
    trial waits for the tailored data (`stages.tune`).
    """
    config = run.config.tune
    run.form = config.target if config.target != "auto" else "reasoning-first"
    if config.target != "auto" or not run.by_label:
        return None
    with run.stage("target", _inputs(run), describe) as stage:
        if stage.todo:
            seeds = list(run.task.seed)[:TRIAL_ROWS]
            rationales = reasons_for(run, seeds)
            # The check has trained the student that gives the answer alone, on the same rows.
            known = run.folder / "check" / "own-labels" if len(seeds) == len(run.task.seed) else None
            found, rows = trial_of_forms(run, stage.folder, seeds, rationales, known)
            stage.write("trial.jsonl", rows)
            stage.finish(found)
    run.form = stage.summary["form"]
    return stage.summary


def _inputs(run: RunContext) -> dict[str, Any]:
    return {
        "elicit": [run.config.elicit.rationale_tokens, run.config.elicit.grammar],
        "answer_tokens": run.config.evaluate.answer_tokens,
        "tune": [run.config.tune.learning_rate, run.config.tune.epochs],
        "teacher": run.identity(run.config.teacher),
        "student": run.identity(run.config.student),
        "data": run.outputs("check"),
        "task": run.task.sha256,
        **run.budget_inputs(),
    }


def reasons_for(run: RunContext, seeds: Sequence[Example]) -> list[str]:
    """Let the teacher reason about labelled examples; a rationale that comes to another answer is left out."""
    teacher = run.config.teacher
    questions = [{"id": str(i), "input": seed.input} for i, seed in enumerate(seeds)]
    rows = generate_rationales(run, run.engine(teacher), questions, [None], "reasons for own labels")
    return [
        row["text"] if matches(row["answer"], seed.target, run.task.answer) else ""
        for row, seed in zip(rows, seeds, strict=True)
    ]


def trial_of_forms(
    run: RunContext,
    folder: Path,
    examples: Sequence[Example],
    rationales: Sequence[str],
    answer_folder: Path | None = None,
) -> tuple[Summary, list[Row]]:
    """Train a student a form on `examples` with `rationales` (empty: none), and compare them on validation examples.

    Returns the summary and a row an example. The students are trained in `folder` and removed; that of the bare
    answer is left where it is, or trained, in `answer_folder` if given.
    """
    held_out = run.task.validation[:TRIAL_EXAMPLES]
    answers: dict[Form, Predictions] = {}
    tokens: dict[str, float] = {}
    reasoned = [i for i, rationale in enumerate(rationales) if rationale]
    for form in FORMS if len(reasoned) >= FEWEST_REASONS else FORMS[:1]:
        how = run.asking(form)
        used = reasoned if form == "reasoning-first" else range(len(examples))
        rows = training_rows(run, how, [examples[i] for i in used], [rationales[i] for i in used])
        out = answer_folder if form == "answer" and answer_folder else folder / form
        model = train_briefly(run, how, rows, out, f"trial, {form}")
        engine = run.engine_with(model, None, run.config.student)
        answers[form] = student_answers(run, engine, how, held_out, f"trial, {form}")
        tokens[form] = sum(map(engine.count_tokens, answers[form].texts)) / len(held_out)
        if out != answer_folder:  # half a gigabyte each, and the answers are stored
            run.close_engines()
            shutil.rmtree(out)
            out.with_name(f"{form}-F16.gguf").unlink(missing_ok=True)
    summary = {
        "form": _decide(answers),
        "n": len(held_out),
        "rows": len(examples),
        "with_reasons": len(reasoned),
        "accuracy": {form: round(found.accuracy, 4) for form, found in answers.items()},
        "tokens": {form: round(mean, 1) for form, mean in tokens.items()},
    }
    return summary, _rows(held_out, answers)


def _decide(answers: dict[Form, Predictions]) -> Form:
    """Return the first form that no later, dearer one clearly beats (one-sided exact McNemar test, p < 0.05)."""
    best: Form = "answer"
    for form, found in answers.items():
        if one_sided(answers[best], found) < 0.05:
            best = form
    return best


def _rows(examples: Sequence[Example], answers: dict[Form, Predictions]) -> list[Row]:
    return [
        {"input": e.input, "target": e.target, **{form: found.answers[i] for form, found in answers.items()}}
        for i, e in enumerate(examples)
    ]


def describe(summary: Summary) -> str:
    """Return the trial in one line."""
    tried = ", ".join(
        f"{form} {accuracy:.0%} in {summary['tokens'][form]:.0f} tokens"
        for form, accuracy in summary["accuracy"].items()
    )
    few = "" if len(summary["accuracy"]) > 1 else f" (reasons for {summary['with_reasons']} rows are too few)"
    return f"the student writes {summary['form']}: {tried}{few}; {summary['rows']} rows each, n = {summary['n']}"

"""The last stage: base student, own-labels controls, tuned student and teacher on the held-out test split.

Every accuracy comes with n and a 95 % Wilson interval, the tuned student against each other model with the exact
McNemar test. Students are asked as their users ask, and once with constrained answers: what the base student gains
by that alone is format, and the table says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.text import Text

from arte_edge.console import ResultTable
from arte_edge.distill.evaluation import (
    Predictions,
    majority_baseline,
    student_answers,
    student_choices,
    teacher_answers,
)
from arte_edge.distill.prompts import Shot
from arte_edge.distill.run_context import Row, RunContext, Summary
from arte_edge.distill.stages.check import own_labels_student
from arte_edge.models.resolve import LocalModel, tuned_student
from arte_edge.results.accuracy import NOT_KNOWN
from arte_edge.results.comparison import AS_ASKED, BASE, OWN, OWN_ALL, TEACHER, TUNED, comparison_of, headline
from arte_edge.stats import format_share, mcnemar, wilson
from arte_edge.tasks.answers import leaf_f1
from arte_edge.tasks.task import Example

CONSTRAINED = "constrained"
_Results = dict[tuple[str, str], Predictions]  # by model and prompting


def evaluate(run: RunContext, tuned: LocalModel) -> Summary:
    """Write answers.jsonl; the summary holds a row for each model and prompting, and the paired tests."""
    config, student = run.config.evaluate, run.config.student
    inputs = {
        "evaluate": config.model_dump(mode="json"),
        "elicit": [run.config.elicit.rationale_tokens, run.config.elicit.opinion_shots],
        "own_labels": [run.config.check.own_labels, run.config.tune.learning_rate, run.config.tune.epochs],
        "form": run.form,
        "teacher": run.identity(run.config.teacher),
        "student": run.identity(student),
        "tuned": tuned.sha256,
        "task": run.task.sha256,
        **run.budget_inputs(),
    }
    with run.stage("evaluate", inputs, _describe) as stage:
        if stage.todo:
            examples = run.task.load_test()
            examples = examples[: config.limit] if config.limit else examples
            results = _students(run, examples, tuned)
            if config.teacher:
                answers, setting = teacher_answers(run, examples)
                results[TEACHER, setting] = answers
            # Trained last: a shard can make the calls before it.
            results = _own_labels(run, examples, stage.folder) | results
            stage.write("answers.jsonl", _answer_rows(examples, results))
            stage.finish(_summary(run, examples, results) | {"tuned": tuned.sha256})
    return stage.summary


def _students(run: RunContext, examples: tuple[Example, ...], tuned: LocalModel) -> _Results:
    """Let the base and the tuned student answer, as asked, after examples, and constrained."""
    student, how, results = run.config.student, run.asking(), _Results()
    engines = {BASE: run.engine(student), TUNED: run.engine_with(tuned, None, student)}
    for n_shot in run.config.evaluate.shots:
        seeds = run.task.seed[:n_shot]
        shots = [Shot(seed.input, how.completion(seed.target)) for seed in seeds]
        setting = f"{len(shots)}-shot" if shots else AS_ASKED  # a small task has fewer than asked for
        for who, engine in engines.items():
            what = f"{who} {setting}"
            results[who, setting] = student_answers(run, engine, how, examples, what, shots)
    for who, engine in engines.items():
        results[who, CONSTRAINED] = student_choices(run, engine, how, examples, f"{who}, {CONSTRAINED}")
    return results


def _own_labels(run: RunContext, examples: tuple[Example, ...], folder: Path) -> _Results:
    """Let the students of own labels answer: of the seed rows (trained in the check), and of validation rows too."""
    if not run.config.check.own_labels or not run.task.seed:
        return {}
    student, how, base = run.config.student, run.asking("answer"), run.local(run.config.student)
    everything = (*run.task.seed, *run.task.validation)
    checkpoint = run.folder / "check" / "own-labels"
    models = {
        OWN: tuned_student(base, checkpoint, checkpoint.with_name("own-labels-F16.gguf")),
        OWN_ALL: own_labels_student(run, everything, folder / "own-labels-all"),
    }
    return {
        (who, AS_ASKED): student_answers(run, run.engine_with(model, None, student), how, examples, who)
        for who, model in models.items()
    }


def _answer_rows(examples: tuple[Example, ...], results: _Results) -> list[Row]:
    return [
        {
            "input": example.input,
            "target": example.target,
            **{f"{who}, {setting}": answered.answers[i] for (who, setting), answered in results.items()},
        }
        for i, example in enumerate(examples)
    ]


def _summary(run: RunContext, examples: tuple[Example, ...], results: _Results) -> Summary:
    config = run.config.evaluate
    first = _first(results)
    share = format_share(
        results[BASE, first].accuracy, results[BASE, CONSTRAINED].accuracy, results[TUNED, first].accuracy
    )
    return {
        "rows": [_row(run, who, setting, answered, examples) for (who, setting), answered in results.items()],
        "paired": [
            {
                "against": who,
                "setting": setting,
                **_paired(answered, results.get((TUNED, setting), results[TUNED, first])),
            }
            for (who, setting), answered in results.items()
            if who != TUNED
        ],
        "form": run.form,
        "role": run.role,
        "format_share": None if share is None else round(share, 4),
        "chance": round(majority_baseline(run, examples), 4),
        **({"caveats": run.caveats} if run.caveats else {}),
        "partial": bool(config.limit) and config.limit < len(run.task.test_keys()),
        **run.budget_inputs(),
    }


def _first(results: _Results) -> str:
    """Return the first prompting of the tuned student: as asked, unless `evaluate.shots` has no 0."""
    return next(setting for who, setting in results if who == TUNED)


def _row(run: RunContext, who: str, setting: str, answered: Predictions, examples: tuple[Example, ...]) -> Row:
    right, n = int(answered.right.sum()), len(examples)
    interval = wilson(right, n)
    targets = (example.target for example in examples)
    f1 = leaf_f1(zip(answered.answers, targets, strict=True), run.task.answer)
    return {
        "model": who,
        "setting": setting,
        "n": n,
        "right": right,
        "accuracy": round(answered.accuracy, 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
        **({} if f1 is None else {"slot_f1": round(f1, 4)}),
    }


def _paired(base: Predictions, tuned: Predictions) -> dict[str, Any]:
    test = mcnemar(base.right, tuned.right)
    return {
        "gained": test.only_b,
        "lost": test.only_a,
        "difference": round(test.difference, 4),
        "low": round(test.low, 4),
        "high": round(test.high, 4),
        "p_value": test.p_value,
    }


def _describe(summary: Summary) -> str:
    by = {(row["model"], row["setting"]): row["accuracy"] for row in summary["rows"]}
    first = next(setting for who, setting in by if who == TUNED)
    summary_table(summary), summary_lines(summary)  # a damaged summary shows here, not after the run
    own = f"{by[OWN, AS_ASKED]:.0%} on your own labels, " if (OWN, AS_ASKED) in by else ""
    return (
        f"{summary['rows'][0]['n']} test examples, {first}: {by[BASE, first]:.0%} before, {own}"
        f"{by[TUNED, first]:.0%} after"
    )


def summary_table(evaluation: Summary) -> ResultTable:
    """Return accuracy by model and prompting, with 95 % intervals, and the tuned student's paired difference.

    Of JSON answers with their slot F1; what is right is then shorter, so that the table fits into 80 columns.
    """
    table = ResultTable(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
    rows = comparison_of(evaluation)
    slots = any(row.slot_f1 is not None for row in rows)
    for name in ("model", "prompting"):
        table.add_column(name, no_wrap=True)
    for name in ("right (95 %)", "slot F1") if slots else ("right", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("tuned minus it", justify="right", no_wrap=True)
    for row in rows:
        right = (f"{row.accuracy:.1%}", f"{100 * row.low:.1f} to {100 * row.high:.1f}")
        if slots:
            right = (row.percent, NOT_KNOWN if row.slot_f1 is None else f"{row.slot_f1:.1%}")
        table.add_row(
            row.model.replace("labels + ", "+ "),  # so that it fits into 80 columns
            row.setting,
            *right,
            row.difference_points,
            style="bold" if row.model == TUNED else "",
        )
    return table


def summary_lines(evaluation: Summary) -> list[str]:
    """Return the text with the table: the headline, n, and the share of the gain that is format."""
    n = evaluation["rows"][0]["n"]
    part = ", a part of the test split: not a result" if evaluation["partial"] else ""
    lines = [
        headline(evaluation),
        *(f"Warning: {caveat}" for caveat in evaluation.get("caveats", ())),
        f"Differences are paired, in points. n = {n} test examples{part}; the majority baseline is "
        f"{evaluation['chance']:.1%}; answer form: {evaluation['form']}.",
    ]
    if (share := evaluation["format_share"]) is not None:
        lines.append(
            f"{share:.0%} of the gain on the base student is format: what that gains from constrained answers alone."
        )
    return lines


def show_summary(console: Console, evaluation: Summary, folder: Path, calls: tuple[int, int]) -> None:
    """Print the headline, the table, the text below it, and the paths."""
    first, *others = summary_lines(evaluation)
    lines = [
        *others,
        "",
        f"Student: {folder / 'tune' / 'student'}",
        f"Run folder: {folder} ({calls[0]} engine calls made, {calls[1]} cached)",
    ]
    console.print(Group(Text(first, style="bold"), summary_table(evaluation), Text("\n".join(lines))), soft_wrap=True)

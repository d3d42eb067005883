"""The last stage: base student, tuned student and teacher on the held-out test split.

Every accuracy comes with n and a 95 % Wilson interval, base against tuned with the exact McNemar test.
The base student is also evaluated with constrained answers: what it gains by that alone is format, and
the table says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.text import Text

from arte_edge.distill.evaluation import (
    Predictions,
    constrained_answers,
    generated_answers,
    majority_baseline,
    teacher_answers,
)
from arte_edge.distill.prompts import teacher_shots
from arte_edge.distill.run_context import Row, RunContext, Summary
from arte_edge.models.resolve import LocalModel
from arte_edge.notebook import ResultTable
from arte_edge.stats import format_share, mcnemar, wilson
from arte_edge.tasks.task import Example

__all__ = ["CONSTRAINED", "evaluate", "show_summary", "summary_lines", "summary_table"]

CONSTRAINED = "constrained"
_BASE, _TUNED = "base student", "tuned student"
_Results = dict[tuple[str, str], Predictions]  # by model and prompting


def evaluate(run: RunContext, tuned: LocalModel) -> Summary:
    """Write answers.jsonl; the summary holds a row for each model and prompting, and the paired tests."""
    config, student = run.config.evaluate, run.config.student
    inputs = {
        "evaluate": config.model_dump(mode="json"),
        "elicit": [run.config.elicit.rationale_tokens, run.config.elicit.grammar],
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
            tokens = run.most_tokens(config.answer_tokens)
            engines = {_BASE: run.engine(student), _TUNED: run.engine_with(tuned, None, student)}
            results: _Results = {}
            for n_shot in config.shots:
                shots = teacher_shots(run.task, n_shot)
                setting = f"{len(shots)}-shot"  # a small task has fewer than asked for
                for who, engine in engines.items():
                    results[who, setting] = generated_answers(
                        run, engine, student, examples, shots, tokens, f"{who} {setting}"
                    )
            for who, engine in engines.items():
                results[who, CONSTRAINED] = constrained_answers(
                    run, engine, student, examples, (), f"{who}, constrained"
                )
            if config.teacher:
                n_shot = len(teacher_shots(run.task, run.config.teacher.shots))
                results["teacher", f"{n_shot}-shot"] = teacher_answers(run, examples)
            stage.write("answers.jsonl", _answer_rows(examples, results))
            stage.finish(_summary(run, examples, results))
    return stage.summary


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
    config, n = run.config.evaluate, len(examples)
    first = next(iter(results))[1]
    share = format_share(
        results[_BASE, first].accuracy, results[_BASE, CONSTRAINED].accuracy, results[_TUNED, first].accuracy
    )
    return {
        "rows": [_row(who, setting, answered, n) for (who, setting), answered in results.items()],
        "paired": {
            setting: _paired(answered, results[_TUNED, setting])
            for (who, setting), answered in results.items()
            if who == _BASE
        },
        "format_share": None if share is None else round(share, 4),
        "chance": round(majority_baseline(run, examples), 4),
        "partial": bool(config.limit) and config.limit < len(run.task.test_keys()),
        **run.budget_inputs(),
    }


def _row(who: str, setting: str, answered: Predictions, n: int) -> Row:
    right = int(answered.right.sum())
    interval = wilson(right, n)
    return {
        "model": who,
        "setting": setting,
        "n": n,
        "right": right,
        "accuracy": round(answered.accuracy, 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
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
    first = summary["rows"][0]["setting"]
    summary_table(summary), summary_lines(summary)  # a damaged summary shows here, not after the run
    return (
        f"{summary['rows'][0]['n']} test examples, {first}: {by[_BASE, first]:.0%} before, "
        f"{by[_TUNED, first]:.0%} after"
    )


def summary_table(evaluation: Summary) -> ResultTable:
    """Return accuracy by model and prompting, with 95 % intervals."""
    table = ResultTable(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in ("model", "prompting"):
        table.add_column(name, no_wrap=True)
    for name in ("right", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in evaluation["rows"]:
        table.add_row(
            row["model"],
            _prompting(row["setting"]),
            f"{row['accuracy']:.1%}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            style="bold" if row["model"] == _TUNED else "",
        )
    return table


def summary_lines(evaluation: Summary) -> list[str]:
    """Return the text below the table: n, the paired tests, and the share of the gain that is format."""
    n = evaluation["rows"][0]["n"]
    part = ", a part of the test split: not a result" if evaluation["partial"] else ""
    lines = [f"n = {n} test examples{part}; the majority baseline is {evaluation['chance']:.1%}."]
    for setting, test in evaluation["paired"].items():
        lines.append(
            f"{_prompting(setting)}: {test['difference']:+.1%} "
            f"({test['low']:+.1%} to {test['high']:+.1%}), "
            f"{test['gained']} gained, {test['lost']} lost, p = {test['p_value']:.2g}."
        )
    share = evaluation["format_share"]
    if share is not None:
        lines.append(
            f"{share:.0%} of the first gain is format: "
            "what the base student gains from constrained answers alone."
        )
    return lines


def show_summary(console: Console, evaluation: Summary, folder: Path, calls: tuple[int, int]) -> None:
    """Print the table, the text below it, and the paths."""
    lines = [
        *summary_lines(evaluation),
        "",
        f"Student: {folder / 'tune' / 'student'}",
        f"Run folder: {folder} ({calls[0]} engine calls made, {calls[1]} cached)",
    ]
    console.print(Group(summary_table(evaluation), Text("\n".join(lines))), soft_wrap=True)


def _prompting(setting: str) -> str:
    """Return the name of a prompting; earlier versions wrote "answer forced" and "8 worked"."""
    return CONSTRAINED if setting == "answer forced" else setting.replace(" worked", "-shot")

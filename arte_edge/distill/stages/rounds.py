"""Tailor and tune, once or in rounds: each round asks for more data where the student of the round before errs.

The errors are those on validation examples, and only how often which answer was mistaken for which other one steers
the teacher (`generation.inputs.focus_of`); the examples never reach it. A round that does not raise validation
accuracy is the last, and the student of the best round is the run's (LLM2LLM, arXiv 2403.15042, has such rounds).
"""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

from arte_edge.distill.evaluation import student_answers
from arte_edge.distill.generation.inputs import focus_of
from arte_edge.distill.run_context import RunContext, Summary
from arte_edge.distill.stages.elicit import first_focus
from arte_edge.distill.stages.tailor import tailor
from arte_edge.distill.stages.tune import tune
from arte_edge.models.resolve import LocalModel
from arte_edge.stats import wilson
from arte_edge.store import link_folder


def tailor_and_tune(run: RunContext, adapter: tuple[Path, str] | None) -> LocalModel:
    """Return the tuned student of the best round, as `stages.tune` does; `adapter` aligns the teacher."""
    tailor(run, adapter, first_focus(run))
    _, best = tune(run)
    if run.config.rounds == 1:
        return best
    most, kept = _validate(run, best, 1)["right"], 1
    for number in range(2, run.config.rounds + 1):
        rows = run.read(run.round_name("validate", number - 1), "answers.jsonl")
        pairs = [(row["target"], row["answer"]) for row in rows] if run.by_label else []
        focus = focus_of(pairs, weighted=True)
        tailor(run, adapter, focus, number)
        _, tuned = tune(run, number)
        right = _validate(run, tuned, number)["right"]
        if right <= most:
            run.reporter.say(f"Round {number} did not raise validation accuracy: round {kept} is kept.")
            break
        best, most, kept = tuned, right, number
    _keep(run.folder, kept)
    return best


def _keep(folder: Path, number: int) -> None:
    """Make ``tune`` the folder of round `number`."""
    source, final = folder / f"tune-{number}", folder / "tune"
    manifests = source / "manifest.json", final / "manifest.json"
    if not (manifests[1].is_file() and filecmp.cmp(*manifests, shallow=False)):
        link_folder(source, final)


def _validate(run: RunContext, tuned: LocalModel, number: int) -> Summary:
    """Let the student of a round answer the validation examples."""
    inputs: dict[str, Any] = {"tuned": tuned.sha256, "form": run.form, "task": run.task.sha256}
    inputs |= {"answer_tokens": run.config.evaluate.answer_tokens, **run.budget_inputs()}
    with run.stage(run.round_name("validate", number), inputs, _describe) as stage:
        if stage.todo:
            engine, examples = run.engine_with(tuned, None, run.config.student), run.task.validation
            found = student_answers(run, engine, run.asking(), examples, f"round {number}")
            stage.write(
                "answers.jsonl",
                (
                    {"input": e.input, "target": e.target, "answer": answer}
                    for e, answer in zip(examples, found.answers, strict=True)
                ),
            )
            stage.finish({"n": len(examples), "right": int(found.right.sum()), "tuned": tuned.sha256})
    return stage.summary


def _describe(summary: Summary) -> str:
    interval = wilson(summary["right"], summary["n"])
    return (
        f"{summary['right'] / summary['n']:.1%} of {summary['n']} validation examples "
        f"({interval.low:.1%} to {interval.high:.1%})"
    )

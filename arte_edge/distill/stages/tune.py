"""Step 6, tune: supervised fine-tuning of the student on the tailored data (paper, section 3.5) and the own labels.

Once, or in rounds: each round asks for more data where the student of the round before errs. The errors are those on
validation examples, and only how often which answer was mistaken for which other one steers the teacher
(`generation.inputs.focus_of`); the examples never reach it. A round that does not raise validation accuracy is the
last, and the student of the best round is the run's (LLM2LLM, arXiv 2403.15042, has such rounds).
"""

from __future__ import annotations

import filecmp
import math
from pathlib import Path
from typing import Any

from arte_edge.asking.form import Asking
from arte_edge.checkpoint import write_chat_template
from arte_edge.distill.evaluation import student_answers
from arte_edge.distill.generation.inputs import focus_of
from arte_edge.distill.run_context import Row, RunContext, Summary
from arte_edge.distill.stages.check import training_rows
from arte_edge.distill.stages.elicit import first_focus
from arte_edge.distill.stages.tailor import tailor
from arte_edge.distill.stages.target import describe as describe_trial
from arte_edge.distill.stages.target import trial_of_forms
from arte_edge.distill.train.common import Lora, SftSettings
from arte_edge.distill.train.sft import train_sft
from arte_edge.models.resolve import LocalModel, tuned_student
from arte_edge.stats import wilson
from arte_edge.store import link_folder
from arte_edge.tasks.task import Example

_TRIAL_ROWS = 150
_LEAST = 0.01  # probability of a choice that is part of a soft label


def tune(run: RunContext, number: int = 1) -> tuple[Summary, LocalModel]:
    """Train the student in round `number`; return the summary and the tuned student as a model on disk.

    Writes ``tune/student`` (a 16-bit checkpoint whose chat template holds the task's instruction) and, for a student
    that came as GGUF, ``tune/student-F16.gguf``; of several rounds in ``tune-1``, ``tune-2`` and so on.
    """
    name = "tune" if run.config.rounds == 1 else f"tune-{number}"
    base, gguf = run.local(run.config.student), run.folder / name / "student-F16.gguf"
    tailored = [run.round_name("tailor", n) for n in range(1, number + 1)]
    inputs = {
        # Off, soft labels are no input: students of before they were there stay.
        "tune": run.config.tune.model_dump(
            mode="json", exclude=None if run.config.tune.soft_labels else {"soft_labels"}
        ),
        "form": run.form,
        "answer_tokens": run.config.evaluate.answer_tokens,
        "student": run.identity(run.config.student),
        "data": run.outputs(*tailored),
        "task": run.task.sha256,
        **run.budget_inputs(),
    }
    with run.stage(name, inputs, _describe) as stage:
        if stage.todo:
            data = [row for stage_name in tailored for row in run.read(stage_name, "train.jsonl")]
            trial = None
            if run.config.tune.target == "auto" and not run.by_label and number == 1:
                some = data[:_TRIAL_ROWS]
                trial, answers = trial_of_forms(
                    run, stage.folder / "trial", _examples(some), [row["rationale"] for row in some]
                )
                stage.write("trial.jsonl", answers)
                run.form = trial["form"]
            how = run.asking()
            rows = _rows(run, how, data)
            stage.write("rows.jsonl", rows)
            model = run.asked(run.engine(run.config.student), how)
            checkpoint, out = run.checkpoint(run.config.student), stage.folder / "student"
            with run.training("SFT") as progress:
                processes = run.config.train.processes
                result = train_sft(checkpoint, rows, out, _settings(run), progress=progress, processes=processes)
            write_chat_template(out, model.chat_template)
            losses = [row["loss"] for row in result.history if "loss" in row]
            stage.finish(
                {
                    "examples": result.examples,
                    "own_labels": len(rows) - len(data),
                    "soft_labels": sum("others" in row for row in rows),
                    "dropped_as_too_long": result.dropped,
                    "steps": result.steps,
                    "loss_first": round(losses[0], 4) if losses else None,
                    "loss_last": round(losses[-1], 4) if losses else None,
                    "form": run.form,
                    "trial": trial,
                    "answer_tokens": how.answer_tokens,
                    "student_sha256": tuned_student(base, result.checkpoint, gguf).sha256,
                }
            )
    run.form = stage.summary["form"]
    return stage.summary, tuned_student(base, run.folder / name / "student", gguf)


def _rows(run: RunContext, how: Asking, data: list[Row]) -> list[Row]:
    """Return the training rows: tailored data, and the task's own labels where they fit the form.

    Reasoning first needs reasons, which own labels lack: an answer without them would teach the student to leave
    them out.
    """
    rows = training_rows(run, how, _examples(data), [row["rationale"] for row in data])
    if (share := run.config.tune.soft_labels) and how.form != "reasoning-first":
        for row, source in zip(rows, data, strict=True):
            if others := _others(how, source, share):
                row["others"] = others
    if run.config.tune.own_labels and how.form != "reasoning-first":
        rows += training_rows(run, how, run.task.seed)
    return rows


def _others(how: Asking, row: Row, share: float) -> dict[str, float]:
    """Return the completions besides the label's, each with its part of the target.

    The target is the label with ``1 - share`` and the teacher's distribution over the choices with `share` (Hinton et
    al., arXiv 1503.02531); a choice of less than 1 % costs a row and teaches nothing. None gives reasons: the row's
    are for its label.
    """
    logs: dict[str, float] = row["choices"]
    top = max(logs.values())
    total = sum(math.exp(value - top) for value in logs.values())
    likely = {choice: p for choice, value in logs.items() if (p := math.exp(value - top) / total) >= _LEAST}
    kept = sum(likely.values())
    return {how.completion(c): share * p / kept for c, p in likely.items() if c != row["label"]}


def _examples(data: list[Row]) -> list[Example]:
    return [Example(row["input"], row["label"]) for row in data]


def _settings(run: RunContext) -> SftSettings:
    config = run.config.tune
    lora = Lora(rank=config.lora_rank, alpha=2.0 * config.lora_rank) if config.method == "lora" else None
    return SftSettings(
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        epochs=config.epochs,
        lora=lora,
        seed=run.config.seed,
    )


def _describe(summary: dict[str, Any]) -> str:
    first, last = summary["loss_first"], summary["loss_last"]
    loss = "" if first is None else f", loss {first:.2f} → {last:.2f}"
    own = f" ({summary['own_labels']} of them your own labels)" if summary["own_labels"] else ""
    own += f", {soft} with soft labels" if (soft := summary.get("soft_labels")) else ""
    trial = f"; {describe_trial(summary['trial'])}" if summary["trial"] else ""
    return f"{summary['examples']} examples{own}, {summary['steps']} steps{loss}{trial}"


def tailor_and_tune(run: RunContext, adapter: tuple[Path, str] | None) -> LocalModel:
    """Return the tuned student of the best round, as `tune` does; `adapter` aligns the teacher."""
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
    with run.stage(run.round_name("validate", number), inputs, _describe_validation) as stage:
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


def _describe_validation(summary: Summary) -> str:
    interval = wilson(summary["right"], summary["n"])
    return (
        f"{summary['right'] / summary['n']:.1%} of {summary['n']} validation examples "
        f"({interval.low:.1%} to {interval.high:.1%})"
    )

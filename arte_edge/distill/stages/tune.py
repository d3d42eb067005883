"""Step 6, tune: supervised fine-tuning of the student on the tailored data (paper, section 3.5)."""

from __future__ import annotations

from typing import Any

from arte_edge.distill.prompts import STEP_BY_STEP, student_messages
from arte_edge.distill.run_context import Row, RunContext, Summary, tuned_student
from arte_edge.distill.train.common import Lora, SftSettings
from arte_edge.distill.train.sft import train_sft
from arte_edge.models.resolve import LocalModel

__all__ = ["tune"]


def tune(run: RunContext) -> tuple[Summary, LocalModel]:
    """Train the student; return the summary and the tuned student as a model on disk.

    Writes ``tune/student`` (a 16-bit checkpoint) and, for a student that came as GGUF, ``tune/student-F16.gguf``.
    """
    base, gguf = run.local(run.config.student), run.folder / "tune" / "student-F16.gguf"
    inputs = {
        "tune": run.config.tune.model_dump(mode="json"),
        "student": run.identity(run.config.student),
        "data": run.outputs("tailor"),
        "task": run.task.sha256,
    }
    with run.stage("tune", inputs, _describe) as stage:
        if stage.todo:
            rows = _training_rows(run)
            stage.write("rows.jsonl", rows)
            run.close_engines()
            checkpoint, out = run.checkpoint(run.config.student), stage.folder / "student"
            with run.reporter.percent("SFT") as progress:
                result = train_sft(checkpoint, rows, out, _settings(run), progress=progress)
            losses = [row["loss"] for row in result.history if "loss" in row]
            stage.finish(
                {
                    "examples": result.examples,
                    "dropped_as_too_long": result.dropped,
                    "steps": result.steps,
                    "loss_first": round(losses[0], 4) if losses else None,
                    "loss_last": round(losses[-1], 4) if losses else None,
                    "student_sha256": tuned_student(base, result.checkpoint, gguf).sha256,
                }
            )
    return stage.summary, tuned_student(base, run.folder / "tune" / "student", gguf)


def _training_rows(run: RunContext) -> list[Row]:
    """Render each training example as the student is prompted: zero-shot, with the prefill of its answer."""
    student = run.config.student
    engine = run.engine(student)
    return [
        {
            "prompt": run.render(engine, student_messages(run.task, row["input"]), STEP_BY_STEP, student),
            "completion": f" {row['rationale'].strip()}",
        }
        for row in run.read("tailor", "train.jsonl")
    ]


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
    return f"{summary['examples']} examples, {summary['steps']} steps{loss}"

"""Step 6, tune: supervised fine-tuning of the student on the tailored data (paper, section 3.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arte_edge.distill.prompts import STEPS, student_messages
from arte_edge.distill.run import Run, Summary
from arte_edge.distill.student_file import tuned_file
from arte_edge.distill.train.settings import Lora, SftSettings
from arte_edge.distill.train.sft import train_sft
from arte_edge.models.local import LocalModel
from arte_edge.store import Stage

__all__ = ["tune"]


def tune(run: Run) -> tuple[Summary, LocalModel]:
    """Train the student; return the summary and the tuned student as a model on disk.

    Writes ``tune/student`` (a 16-bit checkpoint) and, for a student that came as GGUF, ``tune/student-F16.gguf``.
    """
    config = run.config.tune
    base = run.local(run.config.student)

    def body(stage: Stage) -> Summary:
        rows = _rows(run)
        stage.write("rows.jsonl", rows)
        run.release()
        with run.reporter.percent("SFT") as progress:
            result = train_sft(
                base.checkpoint(), rows, stage.folder / "student", _settings(run), progress=progress
            )
        student = tuned_file(base, result.checkpoint, _gguf(run))
        losses = [row["loss"] for row in result.history if "loss" in row]
        return {
            "examples": result.examples,
            "dropped_as_too_long": result.dropped,
            "steps": result.steps,
            "loss_first": round(losses[0], 4) if losses else None,
            "loss_last": round(losses[-1], 4) if losses else None,
            "student_sha256": student.sha256,
        }

    inputs = {
        "tune": config.model_dump(mode="json"),
        "student": run.identity(run.config.student),
        "data": run.outputs("tailor"),
        "task": run.task.sha256,
    }
    summary = run.stage("tune", inputs, body, _say)
    return summary, tuned_file(base, run.folder / "tune" / "student", _gguf(run))


def _gguf(run: Run) -> Path:
    return run.folder / "tune" / "student-F16.gguf"


def _rows(run: Run) -> list[dict[str, Any]]:
    """Render each training example as the student will be asked: zero-shot, its answer started."""
    student = run.config.student
    engine = run.engine(student)
    return [
        {
            "prompt": run.render(engine, student_messages(run.task, row["input"]), STEPS, student),
            "completion": f" {row['rationale'].strip()}",
        }
        for row in run.read("tailor", "train.jsonl")
    ]


def _settings(run: Run) -> SftSettings:
    config = run.config.tune
    lora = Lora(rank=config.lora_rank, alpha=2.0 * config.lora_rank) if config.method == "lora" else None
    return SftSettings(
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        epochs=config.epochs,
        lora=lora,
        seed=run.config.seed,
    )


def _say(summary: Summary) -> str:
    loss = (
        ""
        if summary["loss_first"] is None
        else f", loss {summary['loss_first']:.2f} → {summary['loss_last']:.2f}"
    )
    return f"{summary['examples']} examples, {summary['steps']} steps{loss}"

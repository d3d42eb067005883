"""One question to a run's tuned student, prompted exactly as in its training and evaluation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from arte_edge.cache import sha256_file
from arte_edge.distill.config import build, load_toml
from arte_edge.distill.prompts import ANSWER_STOPS, STEP_BY_STEP, student_messages
from arte_edge.errors import ArteError, InputError
from arte_edge.models.resolve import LocalModel, from_folder
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.loader import open_local
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.answers import extract
from arte_edge.tasks.loaders import load_task

__all__ = ["Reply", "ask_student"]


@dataclass(frozen=True)
class Reply:
    """What a student answered. `answer` is None if its text holds none in the task's form."""

    text: str
    answer: str | None
    prompt_tokens: int
    completion_tokens: int
    seconds: float

    def __str__(self) -> str:
        return self.text if self.answer is None else self.answer

    def _repr_html_(self) -> str:
        from arte_edge.notebook import fragment

        rate = f"{self.completion_tokens} tokens in {self.seconds:.1f} s"
        return fragment(self.answer or "no answer in the task's form", lines=[self.text.strip(), rate])


def ask_student(folder: Path, text: str, *, max_tokens: int = 96) -> Reply:
    """Return the answer of the tuned student of the run in `folder`, generated greedily.

    Raises InputError: the student is not tuned yet, or the run's task is missing; ArteError: the runtime failed.
    """
    config = build(str(folder / "run.toml"), load_toml(folder / "run.toml"))
    task = load_task(config.task.ref, bbh=Path(config.task.bbh) if config.task.bbh else None)
    engine = open_local(_tuned(folder), kind=config.student.engine, parallel=1)
    try:
        prompt = render(
            engine, student_messages(task, text), STEP_BY_STEP, plain=config.student.template == "none"
        )
        began = time.monotonic()
        done = engine.complete([Request(prompt)], Sampling(max_tokens=max_tokens, stop=ANSWER_STOPS))[0]
        seconds = time.monotonic() - began
    finally:
        engine.close()
    if done.error:
        raise ArteError(f"The student did not answer: {done.error}")
    answer = extract(done.text, task.answer)
    return Reply(done.text, answer, done.prompt_tokens, done.completion_tokens, seconds)


def _tuned(folder: Path) -> LocalModel:
    """Return the tuned student: the F16 file that the evaluation used, or the checkpoint."""
    gguf, checkpoint = folder / "tune" / "student-F16.gguf", folder / "tune" / "student"
    if gguf.is_file():
        return LocalModel(f"{folder.name} tuned", sha256_file(gguf), gguf, None, "F16")
    if not (folder / "tune" / "manifest.json").is_file():
        raise InputError(f"{folder}: no tuned student yet", "Run the same `distill` command again to resume.")
    return from_folder(checkpoint, f"{folder.name} tuned")

"""The control: what the student becomes when it is trained on the user's own labels alone.

That is what a user would do without a teacher, so every run trains it: once on the seed rows (in the check, where
it decides what the teacher is good for) and once on seed and validation rows together (in the evaluation).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arte_edge.asking.form import Asking
from arte_edge.checkpoint import write_chat_template
from arte_edge.distill.evaluation import student_prompts
from arte_edge.distill.run_context import Row, RunContext
from arte_edge.distill.train.common import SftSettings
from arte_edge.distill.train.sft import train_sft
from arte_edge.models.resolve import LocalModel, tuned_student
from arte_edge.tasks.task import Example

_BATCH = 4
_STEPS, _MOST_EPOCHS = 80, 10.0  # forty rows are seen eight times
_RATE = 1e-4  # the paper's 2e-5 learns little from forty rows


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

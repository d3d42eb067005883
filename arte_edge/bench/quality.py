"""Right answers of one file, measured where it will run: generate, read the answer, match, and compare in pairs.

The path is the gate's (`arte_edge.verify`): the file's own tokenizer and template, the reasoning
started for the model, greedy decoding, the answer read out of its tags; the same for every format.
Examples are asked one at a time, so that the seconds an answer takes are those a user waits. The
answer to every example is kept, known by a hash of its input: so a file on a device is
compared with the 16-bit student on the same examples even where that student never fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from arte_edge.bench.case import Split
from arte_edge.bench.targets import describe
from arte_edge.errors import InputError
from arte_edge.results.accuracy import Answers, PairedAccuracy, paired_on_common
from arte_edge.results.rows import DeviceFacts, QualityRow
from arte_edge.tasks.task import Example, Task
from arte_edge.threads import thread_count
from arte_edge.verify.accuracy import ANSWER_TOKENS, Answered, answers
from arte_edge.verify.logits import Progress
from arte_edge.verify.opened import Opened, open_model

__all__ = ["ANSWER_TOKENS", "example_key", "measure_quality"]

_LONGEST = 200  # characters of an answer that are kept
_WARMUP_TOKENS = 2


def measure_quality(
    path: Path,
    task: Task,
    *,
    split: Split = "test",
    limit: int = 0,
    reference: Path | QualityRow | None = None,
    threads: int | None = None,
    device: DeviceFacts,
    answer_tokens: int = ANSWER_TOKENS,
    plain: bool = False,
    progress: Progress | None = None,
) -> QualityRow:
    """Let the model at `path` answer the task's examples and return the row.

    Args:
        path: a GGUF file, an ONNX folder or a checkpoint folder.
        task: its `split` is read here; the test split for a final figure, validation for trying out.
        limit: the first so many examples; the row is then marked partial. 0: all of them.
        reference: what the difference is paired with: the 16-bit student (opened, asked and closed
            before the model is), or its row of an earlier run, on whatever machine.
        threads: of the runtime; None takes its default.
        device: the machine, for the row.
        answer_tokens: at most, for one answer.
        plain: leave the chat templates aside, as a run with ``template = "none"`` does.
        progress: is told what is done, how many of how many.

    Raises:
        InputError: the split is empty, nothing there to open, or the reference answered another task.
        ArteError: the runtime for the file is not installed.
    """
    _check_reference(reference, task, split)
    everything = task.load_test() if split == "test" else task.validation
    examples = everything[:limit] if limit else everything
    if not examples:
        raise InputError(f"Task '{task.name}' has no {split} examples", f"Label some in {split}.jsonl.")
    before: tuple[str, Answers] | None = None
    if isinstance(reference, QualityRow):
        before = reference.model_filename, reference.answers
    elif reference is not None:
        model = open_model(reference, threads)
        try:
            found = answers(model, task, examples, plain, max_tokens=answer_tokens, progress=progress)
            before = model.name, _kept(found)
        finally:
            model.close()
    row = _measured(path, task, split, examples, threads, device, answer_tokens, plain, progress)
    row = row.model_copy(update={"partial": len(examples) < len(everything)})
    if before is None:
        return row
    return row.model_copy(update=_reference_fields(*before, row))


def _measured(
    path: Path,
    task: Task,
    split: Split,
    examples: Sequence[Example],
    threads: int | None,
    device: DeviceFacts,
    answer_tokens: int,
    plain: bool,
    progress: Progress | None,
) -> QualityRow:
    target = describe(path)
    model = open_model(path, threads)
    try:
        begin = datetime.now(UTC)
        model.generate(
            ["Question:"], _WARMUP_TOKENS
        )  # the file's pages, buffers: not the first answer's time
        found = answers(model, task, examples, plain, max_tokens=answer_tokens, timed=True, progress=progress)
        tokens = [_count(model, one) for one in found]
        runtime = model.runtime
    finally:
        model.close()
    accuracy = PairedAccuracy.of(task.name, split, sum(one.right for one in found), len(found))
    p50, p95 = _percentiles(found)
    return QualityRow(
        model_filename=target.model_filename,
        format=target.format,
        quantization=target.quantization,
        sha256=target.sha256,
        tensor_sha256=target.tensor_sha256,
        runtime=runtime,
        n_threads=thread_count(threads),
        test_time=begin.strftime("%Y-%m-%dT%H:%M:%SZ"),
        **accuracy.model_dump(),
        task_sha256=task.sha256,
        answers=_kept(found),
        answer_tokens_mean=float(np.mean(tokens)),
        answer_seconds_p50=p50,
        answer_seconds_p95=p95,
        device=device,
    )


def _reference_fields(name: str, answers: Answers, row: QualityRow) -> dict[str, Any]:
    """Return what a row says of its reference. Its own accuracy stays that on all of its examples."""
    found = paired_on_common(name, answers, row.model_filename, row.answers)
    own = {"task", "split", "n", "right", "accuracy", "low", "high"}
    return found.model_dump(exclude=own)


def example_key(example: Example) -> str:
    """Return what an example is known by in `QualityRow.answers`: 16 hex digits of the sha256 of its input."""
    return example.key[:16]


def _check_reference(reference: Path | QualityRow | None, task: Task, split: Split) -> None:
    """Refuse before anything is measured what could not be paired afterwards."""
    if isinstance(reference, Path) and not reference.exists():
        raise InputError(f"{reference}: no such reference", "Give the 16-bit student, or leave it out.")
    if not isinstance(reference, QualityRow):
        return
    if reference.status != "ok" or not reference.answers:
        raise InputError(
            f"The reference {reference.model_filename} has no answers to pair with", "Measure it again."
        )
    if (reference.task_sha256, reference.split) != (task.sha256, split):
        raise InputError(
            f"The reference {reference.model_filename} answered the {reference.split} examples of "
            f"'{reference.task}' as it was then: another split, or another version of the task",
            f"Measure it on the {split} split of this task, or give the 16-bit student itself.",
        )


def _kept(found: Sequence[Answered]) -> Answers:
    return tuple((example_key(one.example), (one.answer or "")[:_LONGEST], one.right) for one in found)


def _percentiles(found: Sequence[Answered]) -> tuple[float | None, float | None]:
    """Return median and 95th percentile of the seconds an answer took, None where none was timed."""
    seconds = [one.seconds for one in found if one.seconds is not None]
    if not seconds:
        return None, None
    return float(np.percentile(seconds, 50)), float(np.percentile(seconds, 95))


def _count(model: Opened, one: Answered) -> int:
    """Return the tokens of an answer: of prompt and answer, less those of the prompt; a stop token is not one."""
    return max(0, len(model.tokens(one.prompt + one.text)) - len(model.tokens(one.prompt)))

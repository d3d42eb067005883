"""Accuracy on the device: the examples of a task answered by a model's file, paired with a reference.

Each model is measured in a child process. The 16-bit file of an export is measured first, and the
others are paired with its answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arte_edge.bench.find_models import Target, describe
from arte_edge.bench.settings import Split, decode_threads
from arte_edge.bench.worker import run_child
from arte_edge.errors import InputError
from arte_edge.results.accuracy import Answers, PairedAccuracy, paired_on_common
from arte_edge.results.rows import DeviceFacts, QualityRow
from arte_edge.runtimes.loader import choose_runtime, open_model
from arte_edge.runtimes.protocol import Runtime
from arte_edge.tasks.task import Example, Task
from arte_edge.threads import thread_count
from arte_edge.verify.accuracy import ANSWER_TOKENS, ExampleAnswer, answer_examples
from arte_edge.verify.logits import Progress

if TYPE_CHECKING:
    from arte_edge.bench.settings import Reporter

__all__ = ["ANSWER_TOKENS", "example_key", "measure_quality", "measure_request", "run_quality"]

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
            found = answer_examples(model, task, examples, plain, max_tokens=answer_tokens, progress=progress)
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
        found = answer_examples(
            model, task, examples, plain, max_tokens=answer_tokens, timed=True, progress=progress
        )
        tokens = [_count(model, one) for one in found]
        runtime = model.facts.runtime
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


def _kept(found: Sequence[ExampleAnswer]) -> Answers:
    return tuple((example_key(one.example), (one.answer or "")[:_LONGEST], one.right) for one in found)


def _percentiles(found: Sequence[ExampleAnswer]) -> tuple[float | None, float | None]:
    """Return median and 95th percentile of the seconds an answer took, None where none was timed."""
    seconds = [one.seconds for one in found if one.seconds is not None]
    if not seconds:
        return None, None
    return float(np.percentile(seconds, 50)), float(np.percentile(seconds, 95))


def _count(model: Runtime, one: ExampleAnswer) -> int:
    """Return the tokens of an answer: of prompt and answer, less those of the prompt; a stop token is not one."""
    return max(0, len(model.tokenize(one.prompt + one.text)) - len(model.tokenize(one.prompt)))


_SIXTEEN_BITS = ("F16", "BF16", "F32", "fp32", "fp16")


def run_quality(
    models: Sequence[Path],
    task: str,
    *,
    split: Split = "test",
    limit: int = 0,
    bbh: Path | None = None,
    threads: int = 0,
    timeout_s: float = 7200.0,
    device: DeviceFacts,
    reporter: Reporter,
    on_row: Callable[[QualityRow], None],
) -> list[QualityRow]:
    """Let every model answer the task's examples and return the rows, those of failures included.

    Args:
        task: a shipped name or a folder.
        limit: examples at most; 0: all.
        threads: 0: one for each core worth using.
        timeout_s: of one model.

    Raises:
        InputError: no such task, or not a model.
    """
    from arte_edge.tasks.loaders import load_task

    loaded = load_task(task, bbh=bbh)  # refused here, and not once a model
    targets = sorted((describe(path) for path in models), key=lambda t: t.quantization not in _SIXTEEN_BITS)
    threads = threads or decode_threads(device)
    reference: QualityRow | None = None
    rows: list[QualityRow] = []
    for number, target in enumerate(targets, 1):
        request = {
            "kind": "quality",
            "path": str(target.path),
            "task": task,
            "bbh": str(bbh) if bbh else None,
            "split": split,
            "limit": limit,
            "threads": threads,
            "device": device.model_dump(mode="json"),
            "reference": None if reference is None else reference.model_dump(mode="json"),
        }
        label = f"{number}/{len(targets)} {target.model_filename} {loaded.name}"

        def show(what: str, done: int, total: int, label: str = label) -> None:
            reporter.progress(f"{label}: {what} {done}/{total}" if total else f"{label}: {what}")

        row = _row(target, run_child(request, timeout_s, show), loaded.name, split, threads, device)
        if reference is None and row.status == "ok" and target.quantization in _SIXTEEN_BITS:
            reference = row
        rows.append(row)
        on_row(row)
    return rows


def _row(
    target: Target, answer: dict[str, Any], task: str, split: Split, threads: int, device: DeviceFacts
) -> QualityRow:
    if "row" in answer:
        row = QualityRow.model_validate_json(json.dumps(answer["row"]))
        return row.model_copy(
            update={
                "sha256": row.sha256 or target.sha256,
                "tensor_sha256": row.tensor_sha256 or target.tensor_sha256,
                "quantization": row.quantization or target.quantization,
            }
        )
    return QualityRow(
        status=answer["status"],
        reason=answer["reason"],
        model_filename=target.model_filename,
        format=target.format,
        quantization=target.quantization,
        sha256=target.sha256,
        tensor_sha256=target.tensor_sha256,
        runtime=choose_runtime(target.path),
        n_threads=threads,
        task=task,
        split=split,
        n=0,
        right=0,
        accuracy=0.0,
        low=0.0,
        high=1.0,
        device=device,
    )


def measure_request(request: dict[str, Any], say: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Answer a request of `run_quality` in the child process."""
    from arte_edge.tasks.loaders import load_task

    say("loading", 0, 0)
    told = request["reference"]
    row = measure_quality(
        Path(request["path"]),
        load_task(request["task"], bbh=Path(request["bbh"]) if request["bbh"] else None),
        split=request["split"],
        limit=request["limit"],
        reference=None if told is None else QualityRow.model_validate_json(json.dumps(told)),
        threads=request["threads"],
        device=DeviceFacts.model_validate_json(json.dumps(request["device"])),
        progress=say,
    )
    return {"row": row.model_dump(mode="json")}

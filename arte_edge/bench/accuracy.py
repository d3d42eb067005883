"""Accuracy on the device: a model answers a task's examples.

This is the child's side; `arte_edge.bench.runner.run_quality` starts one child process per model.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from arte_edge.bench.settings import Request, Split, describe
from arte_edge.bench.timing import OnProgress
from arte_edge.device.contention import CpuMeter, contention
from arte_edge.machine import thread_count
from arte_edge.results.rows import DeviceFacts, QualityRow
from arte_edge.runtimes.loader import open_model
from arte_edge.tasks.task import Example, Task
from arte_edge.verify.accuracy import (
    Questions,
    accuracy_of,
    accuracy_with_grammar,
    answer_examples,
    examples_of,
    noted_tokens,
    questions_for,
)

_ANSWER_CHARS = 200  # of an answer in a row
_WARMUP_TOKENS = 2


def measure_request(request: dict[str, Any], report: OnProgress) -> dict[str, Any]:
    """Run a request of `arte_edge.bench.runner.run_quality` in the child process."""
    from arte_edge.tasks.loaders import load_task

    report("loading", 0, 0)
    asked = Request.model_validate(request["request"])
    row = measure_quality(
        Path(asked.source),
        load_task(str(asked.task), bbh=asked.bbh),
        split=asked.split,
        limit=asked.limit,
        grammar=asked.grammar,
        threads=request["threads"],
        runtime=asked.settings.runtime,
        answer_tokens=asked.answer_tokens,
        device=DeviceFacts.model_validate_json(json.dumps(request["device"])),
        progress=report,
    )
    return {"row": row.model_dump(mode="json")}


def measure_quality(
    path: Path,
    task: Task,
    *,
    split: Split = "test",
    limit: int = 0,
    threads: int | None = None,
    runtime: str = "auto",
    device: DeviceFacts,
    answer_tokens: int = 0,
    grammar: bool = True,
    progress: OnProgress | None = None,
) -> QualityRow:
    """Let the model at `path` answer the task's examples and return the row; partial with a `limit`.

    Args:
        runtime: see `arte_edge.runtimes.loader.choose_runtime`.
        answer_tokens: budget of an answer; 0: what the ``student.json`` beside the file says, else from the task.
        grammar: also answer with a grammar, where the answers have one and the runtime follows it.

    Raises:
        InputError: the split is empty, or the model cannot be opened.
        ArteError: the runtime for the file is not installed.
    """
    everything = examples_of(task, final=split == "test")
    examples = everything[:limit] if limit else everything
    target = describe(path)
    model = open_model(path, threads, runtime)
    try:
        begin = datetime.now(UTC)
        cpu = CpuMeter(thread_count(threads))
        questions = questions_for(model, task, answer_tokens or noted_tokens(path))
        warmup = Questions(replace(questions.asking, answer_tokens=_WARMUP_TOKENS), questions.front)
        warmup.answers(model, [Example("?", "")])  # so that the first answer does not include warming up
        cpu.start()
        found = answer_examples(model, examples, questions, timed=True, grammar=grammar, progress=progress)
        contended, _ = contention([cpu.stop()], thread_count(threads))
        tokens = [  # generated; a stop token does not count
            max(0, len(model.tokenize(one.prompt + one.text)) - len(model.tokenize(one.prompt))) for one in found
        ]
        opened = model.facts.runtime
    finally:
        model.close()
    accuracy = accuracy_of(task, split, found)
    seconds = [one.seconds for one in found if one.seconds is not None]
    p50, p95 = np.percentile(seconds, (50, 95)).tolist() if seconds else (None, None)
    return QualityRow(
        **target.row_fields,
        runtime=opened,
        n_threads=thread_count(threads),
        test_time=begin.strftime("%Y-%m-%dT%H:%M:%SZ"),
        **accuracy.model_dump(),
        task_sha256=task.sha256,
        partial=len(examples) < len(everything),
        answers=tuple((example_key(one.example), (one.answer or "")[:_ANSWER_CHARS], one.right) for one in found),
        with_grammar=accuracy_with_grammar(task, split, found),
        answer_tokens_mean=float(np.mean(tokens)),
        answer_seconds_p50=p50,
        answer_seconds_p95=p95,
        contended=contended,
        device=device,
    )


def example_key(example: Example) -> str:
    """Return an example's key in `QualityRow.answers`: the first 16 hex digits of the sha256 of its input."""
    return example.key[:16]

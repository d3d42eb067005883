"""Two rounds of one student, on the same examples, back to back: is the second faster, and is it as right?

    python benchmarks/closed_round.py ROUND1.gguf ROUND2.gguf --task home_intents --out ROWS.jsonl

Every example is asked of both files, one straight after the other and in turns which first, so that whatever
else the machine does meets both alike. The whole is repeated with both files opened anew; an example's
seconds are the median of its repetitions. Protocol of ``arte-edge bench --task``: greedy, one example
at a time, at most 96 tokens, nothing cut off at a device's budget.

Rows: the example's key, and for each file the answer read, right or not, tokens written, the seconds of each
repetition. The last line of stdout is the summary, one JSON document: right answers with 95 % Wilson
intervals, the exact McNemar test of the pairs, tokens and seconds an answer, the ratio of the mean seconds
with a 95 % bootstrap interval over examples.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.bench.accuracy import example_key
from arte_edge.cache import write_atomic
from arte_edge.runtimes.loader import open_model
from arte_edge.stats import mcnemar, wilson
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Example, Task
from arte_edge.verify.accuracy import answer_examples, questions_for

_WARMUP_EXAMPLES = 3
_RESAMPLES = 10_000


def repetition(files: list[Path], task: Task, examples: tuple[Example, ...]) -> list[list[dict[str, Any]]]:
    """Return what each file answered to each example, ``[n_example][n_file]``, each with its seconds."""
    models = [open_model(path) for path in files]
    try:
        asked = [questions_for(model, task) for model in models]
        for model, how in zip(models, asked, strict=True):
            answer_examples(model, task.seed[:_WARMUP_EXAMPLES], how, timed=True)
        rows = []
        for i, example in enumerate(examples):
            found: list[dict[str, Any]] = [{}, {}]
            for side in (0, 1) if i % 2 == 0 else (1, 0):
                (one,) = answer_examples(models[side], [example], asked[side], timed=True)
                tokens = len(models[side].tokenize(one.prompt + one.text)) - len(models[side].tokenize(one.prompt))
                found[side] = {"answer": one.answer, "right": one.right, "tokens": tokens, "seconds": one.seconds}
            rows.append(found)
        return rows
    finally:
        for model in models:
            model.close()


def merged(example: Example, repeated: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the row of an example, of its repetitions ``[n_repetition][n_file]``."""
    row: dict[str, Any] = {"example": example_key(example), "target": example.target}
    for side in (0, 1):
        first = repeated[0][side]
        seconds = [round(found[side]["seconds"], 4) for found in repeated]
        row[f"round{side + 1}"] = {**first, "seconds": seconds}
        if any(found[side]["answer"] != first["answer"] for found in repeated):
            raise SystemExit(f"{example.input}: greedy answers differ between repetitions")
    return row


def side_summary(file: Path, rows: list[dict[str, Any]], side: str) -> dict[str, Any]:
    n, right = len(rows), sum(row[side]["right"] for row in rows)
    seconds, tokens = medians(rows, side), np.array([row[side]["tokens"] for row in rows])
    interval = wilson(right, n)
    return {
        "file": file.name,
        "n": n,
        "right": right,
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
        "without_an_answer": sum(row[side]["answer"] is None for row in rows),
        "tokens_mean": round(float(tokens.mean()), 2),
        "tokens_p95": round(float(np.percentile(tokens, 95)), 1),
        "seconds_mean": round(float(seconds.mean()), 4),
        "seconds_p50": round(float(np.percentile(seconds, 50)), 4),
        "seconds_p95": round(float(np.percentile(seconds, 95)), 4),
    }


def medians(rows: list[dict[str, Any]], side: str) -> NDArray[np.float64]:
    return np.array([np.median(row[side]["seconds"]) for row in rows])


def summary(files: list[Path], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the module says; differences and ratios are round 2 against round 1."""
    before, after = (np.array([row[side]["right"] for row in rows]) for side in ("round1", "round2"))
    test = mcnemar(before, after)
    slow, fast = medians(rows, "round1"), medians(rows, "round2")
    picks = np.random.default_rng(0).integers(0, len(rows), (_RESAMPLES, len(rows)))
    ratios = fast[picks].mean(axis=1) / slow[picks].mean(axis=1)
    tokens = [np.mean([row[side]["tokens"] for row in rows]) for side in ("round1", "round2")]
    repetitions = np.array([[row[side]["seconds"] for row in rows] for side in ("round1", "round2")])
    each = repetitions[1].mean(axis=0) / repetitions[0].mean(axis=0)
    return {
        "round1": side_summary(files[0], rows, "round1"),
        "round2": side_summary(files[1], rows, "round2"),
        "only_round1_right": test.only_a,
        "only_round2_right": test.only_b,
        "difference": round(test.difference, 4),
        "difference_low": round(test.low, 4),
        "difference_high": round(test.high, 4),
        "p_value": round(test.p_value, 4),
        "tokens_ratio": round(float(tokens[1] / tokens[0]), 4),
        "seconds_ratio": round(float(fast.mean() / slow.mean()), 4),
        "seconds_ratio_low": round(float(np.percentile(ratios, 2.5)), 4),
        "seconds_ratio_high": round(float(np.percentile(ratios, 97.5)), 4),
        "seconds_ratio_each_repetition": [round(float(ratio), 4) for ratio in each],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs=2, help="the same quantization of round 1 and round 2")
    parser.add_argument("--task", default="home_intents")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    task = load_task(given.task)
    examples = task.load_test() if given.split == "test" else task.validation
    repeated = [repetition(given.files, task, examples) for _ in range(given.repetitions)]
    rows = [merged(e, [one[i] for one in repeated]) for i, e in enumerate(examples)]
    write_atomic(given.out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(json.dumps(summary(given.files, rows)))


if __name__ == "__main__":
    main()

"""Record a full grid on a processor, with the pipeline's own engine: no training, so no GPU.

    python benchmarks/studies/score_worth_grid.py WORK.json STUDENT OUT-grid.npz             # log-probabilities
    python benchmarks/studies/score_worth_grid.py WORK.json STUDENT OUT-grid.npz --written 40   # and what is written

WORK.json is from `score_worth_work.py`, STUDENT a checkpoint folder or a GGUF file. Arrays as in
`score_worth_measure.py`. What is written is asked on the preference set alone, with the drafts of the first
questions; -2 stands for the rest.
Killed, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from score_worth_scores import UNASKED

from arte_edge.cache import atomic_file
from arte_edge.distill.prompts import ANSWER_CLOSE, ANSWER_PREFILL, ANSWER_STOPS, STEP_BY_STEP, Shot, student_messages
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.loader import open_engine
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.answers import extract, matches
from arte_edge.tasks.loaders import load_task

TOGETHER, TOKENS = 4, 64  # drafts a call, tokens that a student may write


class Asking:
    """A student and the questions that every draft is shown before."""

    def __init__(self, engine: Any, work: Mapping[str, Any]) -> None:
        self.engine, self.task = engine, load_task(work["task"])
        self.rows = work["validation"]
        self.options = [self.task.answer.options(row["input"]) for row in self.rows]

    def prompts(self, drafts: Sequence[Mapping[str, str]], at: Sequence[int], opening: str) -> list[str]:
        shots = [Shot(draft["input"], draft["text"]) for draft in drafts]
        asked = [self.rows[i]["input"] for i in at]
        return [
            render(self.engine, student_messages(self.task, one, [shot]), opening) for shot in shots for one in asked
        ]

    def logp(self, drafts: Sequence[Mapping[str, str]]) -> np.ndarray[Any, Any]:
        """Return every answer's log-probability ``[d, k, n_choice]``."""
        prompts = self.prompts(drafts, range(len(self.rows)), ANSWER_PREFILL)
        closed = [[choice + ANSWER_CLOSE for choice in own] for own in self.options] * len(drafts)
        found = np.array(self.engine.choose_each(prompts, closed), dtype=np.float32)
        return found.reshape(len(drafts), len(self.rows), -1)

    def right(self, drafts: Sequence[Mapping[str, str]], at: Sequence[int]) -> np.ndarray[Any, Any]:
        """Return 1 right, 0 wrong, -1 no answer ``[d, len(at)]``."""
        requests = [Request(prompt) for prompt in self.prompts(drafts, at, STEP_BY_STEP)]
        done = self.engine.complete(requests, Sampling(max_tokens=TOKENS, stop=tuple(ANSWER_STOPS)))
        targets = [self.rows[i]["target"] for i in at] * len(drafts)
        answers = [extract(one.text, self.task.answer) for one in done]
        marks = [
            -1 if answer is None else int(matches(answer, target, self.task.answer))
            for answer, target in zip(answers, targets, strict=True)
        ]
        return np.array(marks, dtype=np.int8).reshape(len(drafts), len(at))


def record(work: Mapping[str, Any], engine: Any, out: Path, written: int) -> None:
    """Measure what `out` does not hold yet, and save it after every few drafts; then `written` questions' texts."""
    asking, drafts = Asking(engine, work), work["drafts"]
    d, v = len(drafts), len(work["validation"])
    grid: dict[str, Any] = dict(np.load(out)) if out.is_file() else {}
    if not grid:
        n_choice = len(asking.options[0])
        grid = {
            "logp": np.full((d, v, n_choice), np.nan, dtype=np.float32),
            "right": np.full((d, v), UNASKED, dtype=np.int8),
            "truth": np.array([o.index(r["target"]) for o, r in zip(asking.options, asking.rows, strict=True)]),
            "question": np.array([draft["question"] for draft in drafts]),
            "tokens": np.array([engine.count_tokens(draft["text"]) for draft in drafts]),
            "preferred": np.array(work["preferred"]),
        }
    at = grid["preferred"].tolist()
    began = time.monotonic()
    todo = [i for i in range(d) if np.isnan(grid["logp"][i]).any()]
    asks = [("logp", todo[i : i + TOGETHER]) for i in range(0, len(todo), TOGETHER)]
    todo = [i for i in range(d) if drafts[i]["question"] < written and (grid["right"][i, at] == UNASKED).any()]
    asks += [("right", todo[i : i + TOGETHER]) for i in range(0, len(todo), TOGETHER)]
    for n, (what, some) in enumerate(asks):
        mine = [drafts[i] for i in some]
        if what == "logp":
            grid["logp"][some] = asking.logp(mine)
        else:
            grid["right"][np.ix_(some, at)] = asking.right(mine, at)
        with atomic_file(out) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **grid)
        print(f"{what}: {n + 1} of {len(asks)} calls, {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("student")
    parser.add_argument("out", type=Path)
    parser.add_argument("--written", type=int, default=0, metavar="QUESTIONS")
    options = parser.parse_args()
    engine = open_engine(options.student)
    work = json.loads(options.work.read_text("utf-8"))
    record(work, engine, options.out, options.written)


if __name__ == "__main__":
    main()

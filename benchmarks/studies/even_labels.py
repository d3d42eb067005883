"""Does a student learn more from examples whose labels are spread evenly? What `tailor.even_labels` is worth.

    python benchmarks/studies/even_labels.py WORK.json STUDENT_CHECKPOINT     # two cores: 30 minutes

WORK.json holds a teacher's drafts (`score_worth_work.py`; results/score_worth/home_intents-1.5b-work.json). A seed
shuffles the questions and takes one rationale of each, as many as `tailor` asks for: from the same examples the
first `WANTED` train one student, the `WANTED` that spread the labels another, otherwise alike. Both are asked
fresh questions from the task's generator, written and with the answer forced.
Killed, it goes on where it was: rows in results/even_labels/rows.jsonl, summary.json beside them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from score_worth_influence import Learner
from score_worth_record import entropy
from score_worth_stats import mean_interval

from arte_edge.distill.preference.adaptive import interleave_answers
from arte_edge.distill.prompts import ANSWER_STOPS, STEP_BY_STEP
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.store import read_jsonl
from arte_edge.tasks.answers import extract, matches

OUT = Path(__file__).parents[1] / "results" / "even_labels"
WANTED, ASKED = 32, 52  # examples of a quick start, and questions that `tailor` asks for to get them
SEEDS, ITEMS, ANSWER_TOKENS = 8, 160, 64
RATE, BATCH, EPOCHS = 1e-4, 4, 2  # the quick start's
WAYS = ("as they come", "even")


class Student(Learner):
    """A student that can be trained on many drafts, and asked to write."""

    def train_on(self, drafts: Sequence[Mapping[str, str]], seed: int) -> None:
        """Train for `EPOCHS` in batches, as `tune` does."""
        rows = [self.example(draft) for draft in drafts]
        order = [rows[i] for epoch in range(EPOCHS) for i in _shuffled(len(rows), f"{seed}/{epoch}")]
        self.train([order[i : i + BATCH] for i in range(0, len(order), BATCH)], RATE)

    def written(self, asked: Sequence[Mapping[str, str]]) -> int:
        """Return how many of the questions are answered right in the student's own words."""
        requests = [Request(self._prompt(row["input"], STEP_BY_STEP)) for row in asked]
        sampling = Sampling(max_tokens=ANSWER_TOKENS, stop=tuple(ANSWER_STOPS))
        answers = [extract(one.text, self.task.answer) for one in self.engine.complete(requests, sampling)]
        return sum(
            answer is not None and matches(answer, row["target"], self.task.answer)
            for answer, row in zip(answers, asked, strict=True)
        )


def _shuffled(n: int, seed: str) -> list[int]:
    places = list(range(n))
    random.Random(seed).shuffle(places)
    return places


def examples(drafts: Sequence[Mapping[str, Any]], seed: int, way: str) -> list[Mapping[str, Any]]:
    """Return what a student is trained on: one rationale a question, `WANTED` of `ASKED`."""
    shuffled = [drafts[i] for i in _shuffled(len(drafts), str(seed))]
    first = {draft["question"]: draft for draft in reversed(shuffled)}
    asked = list(first.values())[:ASKED]
    order = interleave_answers([row["answer"] for row in asked]) if way == "even" else range(len(asked))
    return [asked[place] for place in sorted(order[:WANTED])]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by = {(row["seed"], row["way"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows if all((row["seed"], way) in by for way in WAYS)})
    out: dict[str, Any] = {"seeds": len(seeds), "items": ITEMS, "examples": WANTED}
    for key in ("right", "forced", "probability_free", "spread"):
        scale = ITEMS if key in ("right", "forced") else 1
        plain, even = ([by[seed, way][key] / scale for seed in seeds] for way in WAYS)
        gaps = [b - a for a, b in zip(plain, even, strict=True)]
        out[key] = {
            WAYS[0]: round(float(np.mean(plain)), 4),
            WAYS[1]: round(float(np.mean(even)), 4),
            "difference": mean_interval(gaps),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("student", type=Path)
    options = parser.parse_args()
    work = json.loads(options.work.read_text("utf-8"))
    student = Student(options.student, work, ITEMS)
    OUT.mkdir(exist_ok=True)
    file = OUT / "rows.jsonl"
    done = {(row["seed"], row["way"]) for row in (read_jsonl(file) if file.is_file() else [])}
    for seed, way in ((seed, way) for seed in range(SEEDS) for way in WAYS):
        if (seed, way) in done:
            continue
        mine = examples(work["drafts"], seed, way)
        student.reset()
        student.train_on(mine, seed)
        row = {"seed": seed, "way": way, "spread": round(entropy([row["answer"] for row in mine]), 4)}
        row |= {"right": student.written(work["outcome"][:ITEMS]), **student.asked()}
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    found = summary(read_jsonl(file))
    (OUT / "summary.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""Does a quantized student prefer other drafts than the student with 16 bits?

    python benchmarks/preference_deployed.py score F16 F16.gguf
    python benchmarks/preference_deployed.py score Q4_K_M Q4_K_M.gguf
    python benchmarks/preference_deployed.py report

Real drafts of a 1.5B teacher (`drafts.json`: 24 questions of `home_intents`, four rationales each) before
each of 40 preference questions, scored by `likelihood`, with and without the induced answer bias. Rows, a
draft each with the score of every question, go to results/preference_deployed; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.distill.preference.scoring import probabilities
from arte_edge.distill.prompts import ANSWER_CLOSE, ANSWER_PREFILL, Shot, student_messages
from arte_edge.runtimes.llamacpp.engine import LlamaCppEngine
from arte_edge.runtimes.prompt_render import render
from arte_edge.stats import pearson
from arte_edge.tasks.loaders import load_task

RESULTS = Path(__file__).parent / "results" / "preference_deployed"
BASE = "F16"
TOGETHER = 4  # drafts in one call
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shift:
    """The changes in the ranking of drafts between two files of one student.

    `r` is the correlation of the drafts' scores, `r_within` that of their distances from their own
    question's mean, `moved` the mean change of a score. Of `questions` with several rationales,
    `best_kept` and `worst_kept` are the shares whose best or worst rationale is unchanged. `flips` counts
    changed bests and worsts, `flips_beyond_error` those where the 16-bit scores of the two differ by more
    than the standard error of their paired difference.
    """

    drafts: int
    items: int
    r: float | None
    r_within: float | None
    moved: float
    questions: int
    best_kept: float | None
    worst_kept: float | None
    flips: int
    flips_beyond_error: int

    def as_dict(self) -> dict[str, Any]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def compare(full: Floats, deployed: Floats, question: Sequence[Hashable]) -> Shift:
    """Compare the scores ``[n_draft, n_item]`` of the same drafts; `question` ``[n_draft]`` groups them."""
    a, b = full.mean(axis=1), deployed.mean(axis=1)
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for draft, key in enumerate(question):
        groups[key].append(draft)
    several = [np.array(drafts) for drafts in groups.values() if len(drafts) > 1]
    kept = {1: 0, -1: 0}
    flips = beyond = 0
    for drafts in several:
        for sign in (1, -1):
            was, now = (drafts[np.argmax(sign * score[drafts])] for score in (a, b))
            kept[sign] += int(was == now)
            if was != now:
                gap = full[was] - full[now]
                flips += 1
                beyond += int(abs(gap.mean()) > gap.std(ddof=1) / np.sqrt(len(gap)))
    within = [_centred(a, several), _centred(b, several)]
    n = len(several)
    return Shift(
        drafts=len(a),
        items=full.shape[1],
        r=pearson(a, b),
        r_within=pearson(*within),
        moved=float((b - a).mean()),
        questions=n,
        best_kept=kept[1] / n if n else None,
        worst_kept=kept[-1] / n if n else None,
        flips=flips,
        flips_beyond_error=beyond,
    )


def _centred(score: Floats, groups: Sequence[NDArray[np.intp]]) -> Floats:
    parts = [score[drafts] - score[drafts].mean() for drafts in groups]
    return np.concatenate(parts) if parts else np.zeros(0)


def work() -> dict[str, Any]:
    """Return the drafts and the preference set's inputs."""
    found: dict[str, Any] = json.loads((RESULTS / "drafts.json").read_text("utf-8"))
    return found


def rows_of(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def score(name: str, gguf: Path, threads: int) -> None:
    """Score the drafts that have no row yet; append a row for each."""
    task, given = load_task("home_intents"), work()
    targets = {example.input: example.target for example in task.validation}
    inputs = given["preference_set"]
    options = [list(task.answer.options(text)) for text in inputs]
    truth = np.array([row.index(targets[text]) for row, text in zip(options, inputs, strict=True)])
    choices = [[option + ANSWER_CLOSE for option in row] for row in options]
    engine = LlamaCppEngine(gguf, sha256="", threads=threads)
    drafts = given["drafts"]
    for start in range(len(rows_of(name)), len(drafts), TOGETHER):
        pack = drafts[start : start + TOGETHER]
        prompts = [
            render(engine, student_messages(task, text, [Shot(draft["input"], draft["text"])]), ANSWER_PREFILL)
            for draft in pack
            for text in inputs
        ]
        found = iter(engine.choose_each(prompts, choices * len(pack)))
        with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            for number in range(start, start + len(pack)):
                logp = np.array([next(found) for _ in inputs])
                shares = {
                    kind: probabilities(logp, free=free)[np.arange(len(truth)), truth].round(5).tolist()
                    for kind, free in (("raw", False), ("free", True))
                }
                file.write(json.dumps({"draft": number, **shares}) + "\n")
        print(f"{name}: {start + len(pack)} of {len(drafts)} drafts", flush=True)
    engine.close()


def shift(name: str, kind: str) -> Shift:
    """Return how `name` differs from the base in one kind of score, on the drafts that both have."""
    base, other = rows_of(BASE), rows_of(name)
    n = min(len(base), len(other))
    question = [draft["question"] for draft in work()["drafts"][:n]]
    full, deployed = (np.array([row[kind] for row in rows[:n]]) for rows in (base, other))
    return compare(full, deployed, question)


def report() -> str:
    """Return a table of all scored files against the base."""
    lines = ["| file | score | drafts | r | r within a question | moved | best kept | worst kept | flips |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.jsonl")):
        for kind in ("free", "raw"):
            if path.stem != BASE:
                s = shift(path.stem, kind)
                flips = f"{s.flips} of {2 * s.questions}, {s.flips_beyond_error} beyond the standard error"
                cells = [path.stem, kind, f"{s.drafts}", f"{s.r:.3f}", f"{s.r_within:.3f}", f"{s.moved:+.4f}"]
                cells += [f"{s.best_kept:.0%}", f"{s.worst_kept:.0%}", flips]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("score", help="score all drafts with one file")
    one.add_argument("name", help="of the file, in the table")
    one.add_argument("gguf", type=Path)
    one.add_argument("--threads", type=int, default=os.cpu_count())
    commands.add_parser("report", help="print the table")
    arguments = parser.parse_args()
    if arguments.command == "score":
        score(arguments.name, arguments.gguf, arguments.threads)
    else:
        print(report())


if __name__ == "__main__":
    main()

"""Does a race find the pairs of the full grid? Recorded grids, raced again and again.

    python benchmarks/race.py record RUN NAME     # keep a run's full grid (prefer.race = "off")
    python benchmarks/race.py                     # race every recorded grid, 100 seeds a share

A recorded grid holds the student's log-probabilities of every answer, for every draft and every
question of the preference set, from a real run. A seed shuffles drafts and questions, so that a race begins
somewhere else. A pair's end counts as found if it is the full grid's own best (or worst) rationale of
its question, or tied with it: closer than the standard error of their paired difference.

Beside the race stand the same number of calls spent evenly, on the first questions of every draft,
with the plain mean and with the same model of the grid (`belief`). Writes summary.json and agreement.svg
under benchmarks/results/race/.
"""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.distill.belief import believe
from arte_edge.distill.race import Race
from arte_edge.distill.scores import probabilities
from arte_edge.store import read_jsonl, write_atomic
from arte_edge.tasks.load import load_task

RESULTS = Path(__file__).parent / "results" / "race"
SHARES = (0.1, 0.15, 0.2, 0.25, 0.35, 0.5)
Floats = NDArray[np.float64]


def record(run: Path, name: str) -> None:
    """Write the grid of a run whose prefer stage was measured in full."""
    drafts = [row for row in read_jsonl(run / "elicit" / "rationales.jsonl") if row["usable"]]
    calls = [json.loads(line) for line in (run / "calls.jsonl").read_text().splitlines()]
    rows = [call["logp"] for call in calls if call.get("what") == "scores"]
    items = read_jsonl(run / "calibrate" / "preference_set.jsonl")
    task = tomllib.loads((run / "run.toml").read_text())["task"]["ref"]
    choices = load_task(task).answer.options(items[0]["input"])
    numbers = {key: i for i, key in enumerate(dict.fromkeys(draft["question"] for draft in drafts))}
    grid = {
        "question": [numbers[draft["question"]] for draft in drafts[: len(rows)]],
        "target": [item["target"] for item in items],
        "choices": list(choices),
        "logp": [[[round(x, 4) for x in cell] for cell in row] for row in rows],
    }
    write_atomic(RESULTS / f"{name}.json", json.dumps(grid).encode())
    print(f"{name}: {len(rows)} drafts of {len(numbers)} questions × {len(items)}")


def cells(grid: dict[str, Any], order: Sequence[str], *, soft: bool) -> Floats:
    """Return the bias-free score of every cell, ``[d, k]``. `order` is that of the choices in ``logp``."""
    logp = np.array(grid["logp"])  # [d, k, n_choice]
    truth = np.array([list(order).index(target) for target in grid["target"]])
    shares = np.array([probabilities(row, free=True) for row in logp])
    if soft:
        return np.asarray(shares[:, np.arange(len(truth)), truth])
    return np.asarray(shares.argmax(axis=2) == truth, dtype=float)


def found(grid: Floats, question: Sequence[int], score: Floats) -> float:
    """Return the share of best and worst rationales that `score` finds, or ties of theirs."""
    full, same = grid.mean(axis=1), []
    for key in sorted(set(question)):
        drafts = [draft for draft, mine in enumerate(question) if mine == key]
        if len(drafts) < 2:
            continue
        for sign in (1.0, -1.0):
            true = max(drafts, key=lambda d: sign * full[d])
            mine = max(drafts, key=lambda d: sign * score[d])
            gap = grid[true] - grid[mine]
            same.append(true == mine or abs(gap.mean()) <= gap.std(ddof=1) / math.sqrt(grid.shape[1]))
    return float(np.mean(same))


def race(grid: Floats, question: Sequence[int], share: float) -> tuple[float, float]:
    """Return the agreement of one race and the share of the grid that it measured."""
    rules = Race(tuple(question), grid.shape[1], share)
    values = np.full_like(grid, np.nan)
    while asks := rules.ask(values):
        for ask in asks:
            values[ask.draft, list(ask.items)] = grid[ask.draft, list(ask.items)]
    return found(grid, question, believe(values).mean), float(np.isfinite(values).mean())


def even(grid: Floats, question: Sequence[int], share: float) -> tuple[float, float]:
    """Return the agreement of the same calls spent evenly: plain means, and means under the model."""
    d, k = grid.shape
    n = max(2, round(share * k))
    pilots = range(1, d, 12)
    values = np.full_like(grid, np.nan)
    m = max(2, round((share * d - len(pilots)) * k / max(d - len(pilots), 1)))
    values[:, :m] = grid[:, :m]
    values[list(pilots)] = grid[list(pilots)]
    return found(grid, question, grid[:, :n].mean(axis=1)), found(grid, question, believe(values).mean)


def shuffled(grid: Floats, question: Sequence[int], seed: int) -> tuple[Floats, list[int]]:
    """Return the grid with its questions' drafts and its items in another order."""
    rng = np.random.default_rng(seed)
    keys = rng.permutation(len(set(question)))
    rows = sorted(range(len(question)), key=lambda d: (keys[question[d]], rng.random()))
    return grid[rows][:, rng.permutation(grid.shape[1])], [question[row] for row in rows]


def interval(values: Sequence[float]) -> list[float]:
    half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return [round(float(np.mean(values)) - half, 4), round(float(np.mean(values)) + half, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("record", nargs="*", metavar="record RUN NAME")
    parser.add_argument("--seeds", type=int, default=100)
    options = parser.parse_args()
    if options.record:
        return record(Path(options.record[1]), options.record[2])
    summary = []
    for path in sorted(RESULTS.glob("*.json")):
        if path.stem == "summary":
            continue
        grid = json.loads(path.read_text())
        for kind in ("likelihood", "forced"):
            values = cells(grid, grid["choices"], soft=kind == "likelihood")
            for share in SHARES:
                runs = [shuffled(values, grid["question"], seed) for seed in range(options.seeds)]
                raced = [race(*one, share) for one in runs]
                spent = [even(*one, share) for one in runs]
                row: dict[str, Any] = {"grid": path.stem, "score": kind, "share": share}
                row |= {"drafts": values.shape[0], "items": values.shape[1], "seeds": options.seeds}
                row["measured"] = round(float(np.mean([r[1] for r in raced])), 4)
                for name, list_ in (
                    ("race", [r[0] for r in raced]),
                    ("even", [e[0] for e in spent]),
                    ("even_model", [e[1] for e in spent]),
                ):
                    row[name] = round(float(np.mean(list_)), 4)
                    row[f"{name}_ci95"] = interval(list_)
                summary.append(row)
                print(json.dumps(row), flush=True)
    write_atomic(RESULTS / "summary.json", json.dumps(summary, indent=1).encode())


if __name__ == "__main__":
    main()

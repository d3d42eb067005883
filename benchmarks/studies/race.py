"""Does a race find the pairs of the full grid? A recorded grid, raced again and again.

    python benchmarks/studies/race.py            # 100 seeds a share; results/race/summary.json, docs/figures/race.svg

The grids are those of `score_worth_measure.py` and `score_worth_grid.py`: every answer's log-probability, and
what was written, for every draft of a real teacher and every question of the preference set. A seed draws
questions with about 160 (or 400) drafts and shuffles drafts and items, so that a race begins somewhere else on
other drafts. A pair's end counts as found
if it is the full grid's own best (or worst) rationale of its question, or tied with it: closer than the
standard error of their paired difference. "without parroted": no text that the teacher repeats for question
after question (`arte_edge.distill.generation.rationales`), which are easy to tell apart from the rest.

"likelihood" is the default score, without what a draft's length explains (`preference.scoring`); how much that is,
 each way has to learn from the cells that it measured. Beside the race stand the same number of calls
spent evenly, on the first questions of every draft, with the plain mean and with the same model of the grid
(`belief`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import write_svg
from numpy.typing import NDArray
from score_worth_scores import UNASKED

from arte_edge.cache import write_atomic
from arte_edge.distill.generation.rationales import reject_repeated
from arte_edge.distill.preference.adaptive import AdaptivePlan, fit_score_model
from arte_edge.distill.preference.scoring import length_effect, probabilities
from arte_edge.publish.report.charts import Axis, Plot

HERE = Path(__file__).parents[1]
RECORDED, RESULTS = HERE / "results" / "score_worth", HERE / "results" / "race"
FIGURE = HERE.parent / "docs" / "figures" / "race.svg"
SHARES = (0.1, 0.15, 0.25, 0.5)
SIZES = (160, 400)  # drafts of one race, about
LIKELY = ("likelihood", "likelihood, any length")
WAYS = ("race", "even, model", "even")
LABELS = {"race": "adaptive", "even, model": "uniform, score model", "even": "uniform"}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Drafts:
    """A grid ``[d, k]`` to be raced, whose rationales the drafts are, and the lengths to be taken out, if any."""

    grid: Floats
    question: list[int]
    tokens: Floats | None

    def level(self, score: Floats) -> Floats:
        """Return scores ``[d]`` without what length explains of them."""
        return score if self.tokens is None else score - length_effect(score, self.tokens)


def cells(grid: Mapping[str, Any]) -> dict[str, Floats]:
    """Return every cell's contribution to a draft's score ``[d, k]`` on the preference set, by kind of score."""
    at = grid["preferred"]
    logp, truth = grid["logp"][:, at].astype(float), grid["truth"][at]
    shares = np.array([probabilities(row, free=True) for row in logp])
    likely = shares[:, np.arange(len(truth)), truth]
    return {
        "likelihood": likely,
        "likelihood, any length": likely,
        "forced": (shares.argmax(axis=2) == truth).astype(float),
        "accuracy": (grid["right"][:, at] == 1).astype(float),
    }


def found(drafts: Drafts, score: Floats) -> float:
    """Return the share of best and worst rationales that `score` finds, or ties of theirs."""
    plain = drafts.grid.mean(axis=1)
    grid = drafts.grid + (drafts.level(plain) - plain)[:, None]
    full, mine, same = grid.mean(axis=1), drafts.level(score), []
    for key in sorted(set(drafts.question)):
        own = [draft for draft, asked in enumerate(drafts.question) if asked == key]
        if len(own) < 2:
            continue
        for sign in (1.0, -1.0):
            true = max(own, key=lambda d: sign * full[d])
            said = max(own, key=lambda d: sign * mine[d])
            gap = grid[true] - grid[said]
            same.append(true == said or abs(gap.mean()) <= gap.std(ddof=1) / math.sqrt(grid.shape[1]))
    return float(np.mean(same))


def race(drafts: Drafts, share: float) -> tuple[float, float]:
    """Return the agreement of one race and the share of the grid that it measured."""
    plan = AdaptivePlan(tuple(drafts.question), drafts.grid.shape[1], share)
    values = np.full_like(drafts.grid, np.nan)
    seen = values
    while todo := plan.next_round(seen):
        for cell in todo:
            values[cell.draft, list(cell.items)] = drafts.grid[cell.draft, list(cell.items)]
        mean = fit_score_model(values).mean if drafts.tokens is not None else np.zeros(len(values))
        seen = values + (drafts.level(mean) - mean)[:, None]
    return found(drafts, fit_score_model(values).mean), float(np.isfinite(values).mean())


def even(drafts: Drafts, share: float) -> tuple[float, float]:
    """Return the agreement of the same calls spent evenly: means under the model, and plain means."""
    grid = drafts.grid
    d, k = grid.shape
    n = max(2, round(share * k))
    pilots = range(1, d, 12)
    values = np.full_like(grid, np.nan)
    m = max(2, round((share * d - len(pilots)) * k / max(d - len(pilots), 1)))
    values[:, :m] = grid[:, :m]
    values[list(pilots)] = grid[list(pilots)]
    return found(drafts, fit_score_model(values).mean), found(drafts, grid[:, :n].mean(axis=1))


def drawn(grid: Floats, question: NDArray[np.intp], tokens: Floats | None, seed: int, size: int) -> Drafts:
    """Return the rows of some questions, `size` or all that there are, drafts and items in another order."""
    rng = np.random.default_rng(seed)
    keys: list[int] = []
    for key in rng.permutation(np.unique(question)).tolist():
        if np.isin(question, keys).sum() >= size:
            break
        keys.append(key)
    rows = [row for row, key in enumerate(question) if key in keys]
    rows.sort(key=lambda row: (keys.index(question[row]), rng.random()))
    whose = [keys.index(question[row]) for row in rows]
    return Drafts(grid[rows][:, rng.permutation(grid.shape[1])], whose, None if tokens is None else tokens[rows])


def kept(name: str, grid: Mapping[str, Any]) -> dict[str, NDArray[np.intp]]:
    """Return which drafts are raced: all, and those that are not parroted where a question has two or more of them."""
    work = json.loads((RECORDED / f"{name}-work.json").read_text("utf-8"))
    rows = [{"question": str(d["question"]), "text": d["text"], "usable": True} for d in work["drafts"]]
    reject_repeated(rows)
    usable = np.flatnonzero([row["usable"] for row in rows])
    several = [i for i in usable if (grid["question"][usable] == grid["question"][i]).sum() > 1]
    every = {} if len(usable) == len(rows) else {"all": np.arange(len(rows))}
    return every | {"without parroted": np.array(several)}


def interval(values: Sequence[float]) -> list[float]:
    half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return [round(float(np.mean(values)) - half, 4), round(float(np.mean(values)) + half, 4)]


def curve(rows: Sequence[Mapping[str, Any]]) -> Plot:
    """Draw agreement against calls for the default score, parroted drafts left out, on the largest grid."""
    mine = [row for row in rows if row["score"] == "likelihood" and row["drafts_are"] == "without parroted"]
    mine = [row for row in mine if row["drafts"] == max(other["drafts"] for other in mine)]
    plot = Plot(
        Axis("share of the full grid's calls", 0.0, 0.55),
        Axis("best and worst rationales found", 0.7, 1.0),
        title="Adaptive scoring",
        desc="Share of best and worst rationales found, against calls, for adaptive and uniform spending.",
        legend=[(LABELS[way], i) for i, way in enumerate(WAYS)],
    )
    for i, way in enumerate(WAYS):
        spent = "measured" if way == "race" else "share"  # a race that has decided all stops early
        plot.line([(row[spent], row[way]) for row in mine], i, dashed=i > 0)
        for row in mine:
            low, high = row[f"{way} ci95"]
            plot.whisker((row[spent], row[spent]), (max(low, 0.7), min(high, 1.0)), i)
            plot.mark(row[spent], row[way], i, tip=f"{LABELS[way]}: {row[way]:.3f} at {row[spent]:.0%}")
    return plot


def compared(draws: Sequence[Drafts], share: float) -> dict[str, Any]:
    """Race every draw and spend the same calls evenly; return the mean agreements and their intervals."""
    raced = [race(one, share) for one in draws]
    spent = [even(one, share) for one in draws]
    row: dict[str, Any] = {"share": share, "drafts": round(float(np.mean([len(one.question) for one in draws])), 1)}
    row |= {"seeds": len(draws), "measured": round(float(np.mean([r[1] for r in raced])), 4)}
    lists = ([r[0] for r in raced], [e[0] for e in spent], [e[1] for e in spent])
    for way, agreements in zip(WAYS, lists, strict=True):
        row[way] = round(float(np.mean(agreements)), 4)
        row[f"{way} ci95"] = interval(agreements)
    return row


def of_grid(name: str, seeds: int) -> list[dict[str, Any]]:
    """Return a row for each choice of drafts, score, size and share of the calls."""
    found, grid = [], dict(np.load(RECORDED / f"{name}-grid.npz"))
    values, asked = cells(grid), (grid["right"][:, grid["preferred"]] != UNASKED).all(axis=1)
    for which, usable in kept(name, grid).items():
        for kind, size in ((kind, size) for size in SIZES for kind in values):
            rows = usable[asked[usable]] if kind == "accuracy" else usable
            if len(rows) == 0 or (size > SIZES[0] and (kind not in LIKELY or len(rows) < size)):
                continue
            tokens = grid["tokens"][rows].astype(float) if kind == "likelihood" else None
            mine = values[kind][rows], grid["question"][rows], tokens
            draws = [drawn(*mine, seed, size) for seed in range(seeds)]
            for share in SHARES if kind == "likelihood" else (0.25,):
                row = {"grid": name, "drafts_are": which, "score": kind, **compared(draws, share)}
                found.append(row)
                print(json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    seeds = parser.parse_args().seeds
    names = [path.name.removesuffix("-grid.npz") for path in sorted(RECORDED.glob("*-grid.npz"))]
    summary = [row for name in names for row in of_grid(name, seeds)]
    RESULTS.mkdir(exist_ok=True)
    write_atomic(RESULTS / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    FIGURE.parent.mkdir(exist_ok=True)
    write_svg(curve(summary), FIGURE)


if __name__ == "__main__":
    main()

"""Is a preference score worth anything? From recorded grids and trainings to tables and figures.

    python benchmarks/studies/score_worth.py     # results/score_worth/summary.json, tables.md; docs/figures/score-*.svg

What was recorded, and how: `score_worth_work.py` (drafts), `score_worth_measure.py` (grids, trainings). Asked here:

* Does the preference set pick the rationales that all validation questions would (the paper's check)?
* Is a score the same on two halves of the questions?
* How much of it is only the induced answer bias, or the draft's length?
* Does training on a draft do what its score promises: one draft alone, and groups of drafts?

A draft is *parroted* if the teacher gives its text to question after question (`generation.rationales`).
Intervals are 95 %: over draws of whole questions (drafts of one question are alike), whole groups (a group's
seeds are alike), or Student's t over the seeds of one pair of groups, which says nothing of other drafts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from score_worth_figures import ends_chart, parrots_chart
from score_worth_record import RESULTS, Record
from score_worth_scores import SCORES, UNASKED, Floats, bias_of, draft_scores
from score_worth_stats import (
    centred,
    consistency,
    distinct_groups,
    groups_of,
    mean_interval,
    pearson,
    rate,
    reliability,
    spearman,
    with_interval,
)

from arte_edge.cache import write_atomic
from arte_edge.distill.preference.scoring import length_effect

OUTCOMES = ("right", "forced", "probability_free")
PAIRS = (("best", "worst"), ("top questions", "bottom questions"))
FEW_QUESTIONS = (4, 8, 16)
DICE = 300
FEW = 0.35  # share of parroted drafts below which a group counts as having few
CONTROLS = ("shortest", "own-likelihood", "random")


def one_draft(record: Record, score: Floats) -> dict[str, list[float]]:
    """Return how a score agrees with what training on one draft did, over drafts that are not parroted."""
    question, gain, clusters = record.part["question"], record.gain, distinct_alone(record)
    places = np.sort(np.concatenate(clusters))
    inside, own = centred(gain, question), centred(score, question)
    several = [part for part in clusters if part.size > 1]
    left = np.array(gain)  # without what a short draft does because it is short
    left[places] -= length_effect(gain[places], record.part["tokens"][places].astype(float))
    return {
        "all": with_interval(lambda at: spearman(score[at], gain[at]), clusters),
        "within": with_interval(lambda at: spearman(own[at], inside[at]), several),
        "less length": with_interval(lambda at: spearman(score[at], left[at]), clusters),
        "n": [len(places), len(several)],
    }


def distinct_alone(record: Record) -> list[NDArray[np.intp]]:
    """Return by question the places of the drafts trained on alone that are not parroted."""
    places = np.flatnonzero(~record.parroted[record.alone])
    parts = (np.intersect1d(part, places) for part in groups_of(record.part["question"]))
    return [part for part in parts if part.size]


def length_control(record: Record, alone: Mapping[str, Floats]) -> list[float]:
    """Return by how much control for length raises the default's correlation with one draft's training."""
    plain, controlled, gain = alone["likelihood-free"], alone["length-controlled"], record.gain
    return with_interval(
        lambda at: spearman(controlled[at], gain[at]) - spearman(plain[at], gain[at]), distinct_alone(record)
    )


def trained(record: Record, name: str, score: Floats) -> dict[str, Any]:
    """Return what training on a score's two ends does, and how group means of the score order the groups."""
    out: dict[str, Any] = {}
    for upper, lower in PAIRS:
        ends = {
            part: {r["seed"]: r for r in record.runs if r["score"] == name and r["part"] == part}
            for part in (upper, lower)
        }
        seeds = sorted(set(ends[upper]) & set(ends[lower]))
        for outcome in OUTCOMES:
            gaps = [rate(ends[upper][s], outcome) - rate(ends[lower][s], outcome) for s in seeds]
            out[f"{upper} - {lower}, {outcome}"] = [*mean_interval(gaps), len(gaps)]
    means = record.means(score)
    sets = distinct_groups(record.runs)
    few = [places for places in sets if (record.share[places] < FEW).all()]
    for outcome in OUTCOMES:
        value = record.outcome(outcome)
        out[f"groups, {outcome}"] = with_interval(lambda at, v=value: spearman(means[at], v[at]), sets)
        out[f"groups alike, {outcome}"] = with_interval(lambda at, v=value: record.alike(means, v, at), sets)
        if len(few) > 4:
            out[f"few parroted, {outcome}"] = with_interval(lambda at, v=value: spearman(means[at], v[at]), few)
    return out | {"groups": len(record.runs), "sets": len(sets), "few": len(few)}


def of_task(record: Record) -> dict[str, Any]:
    """Return everything that is asked of one task's records."""
    scores, alone = draft_scores(record.grid), draft_scores(record.part)
    bias, length = bias_of(record.grid), np.log(record.grid["tokens"].astype(float))
    kept, halves = consistency(record.grid), reliability(record.grid)
    few = [reliability(record.grid, k) for k in FEW_QUESTIONS]
    table = {}
    for key in SCORES:
        if key in scores:
            table[key] = of_score(record, scores[key], bias, length)
            if key not in CONTROLS:
                table[key] |= {"consistency": kept[key], "halves": halves[key]}
                table[key] |= {"few questions": [one[key] for one in few]}
            if record.base:
                table[key] |= {"trained": trained(record, key, scores[key])}
        if key in alone:
            table[key] = table.get(key, {}) | {"one draft": one_draft(record, alone[key])}
    keys = list(scores)
    return {
        "drafts": int(record.question.size),
        "questions": len(groups_of(record.question)),
        "parroted": int(record.parroted.sum()),
        "k": int(record.grid["preferred"].size),
        **written(record.part),
        **(of_groups(record) if record.base else {}),
        "length control adds": length_control(record, alone),
        "scores": table,
        "agreement": {a: {b: round(spearman(scores[a], scores[b]), 3) for b in keys} for a in keys},
    }


def of_score(record: Record, own: Floats, bias: Floats, length: Floats) -> dict[str, float]:
    """Return how a score goes with the drafts' answer bias, log length and repeats, on the whole grid."""
    both = np.column_stack([np.ones_like(bias), bias, length])
    left = own - both @ np.linalg.lstsq(both, own, rcond=None)[0]
    return {
        "spread": round(float(own.std()), 4),
        "bias": round(pearson(own, bias), 3),
        "length": round(pearson(own, length), 3),
        "explained by bias and length": round(1 - float(left.var() / own.var()), 3),
        "parroted": round(pearson(own, record.parroted.astype(float)), 3),
    }


def written(grid: Mapping[str, Any]) -> dict[str, float]:
    """Return what share of the texts that were asked for has the right answer, and any."""
    asked = grid["right"][grid["right"] != UNASKED]
    return {
        "one-shot right": round(float((asked == 1).mean()), 4),
        "one-shot answered": round(float((asked >= 0).mean()), 4),
    }


def of_groups(record: Record) -> dict[str, Any]:
    """Return the untrained student, and what orders the trained groups whatever their scores.

    *A die reaches*: groups share drafts, so chance orders them further than intervals over groups say; 95 % of
    fresh random scores stay within these. *Random groups*: standard deviation of the outcome between groups drawn
    at random. *Length*: rank correlation with a group's mean log length.
    """
    sets = distinct_groups(record.runs)
    rng = np.random.default_rng(2)
    dice = [record.means(rng.random(record.question.size)) for _ in range(DICE)]
    drawn = np.array([row["score"] == "none" for row in record.runs])
    length = record.means(np.log(record.grid["tokens"].astype(float)))
    answered = np.array([row["answered"] / row["n"] for row in record.runs])
    return {
        "base": {key: record.base[key] for key in ("n", *OUTCOMES)},
        "a die reaches": {
            outcome: [
                round(float(q), 3)
                for q in np.quantile([record.alike(die, record.outcome(outcome)) for die in dice], (0.025, 0.975))
            ]
            for outcome in OUTCOMES
        },
        "random groups": {outcome: round(float(record.outcome(outcome)[drawn].std(ddof=1)), 4) for outcome in OUTCOMES},
        "length": {outcome: round(spearman(length, record.outcome(outcome)), 3) for outcome in OUTCOMES}
        | {"answered": round(spearman(length, answered), 3)},
        "groups against": {
            f"{what}, {outcome}": with_interval(
                lambda at, v=value, o=outcome: spearman(v[at], record.outcome(o)[at]), sets
            )
            for what, value in (("parroted share", record.share), ("spread of labels", record.spread))
            for outcome in OUTCOMES
        },
    }


def tables(summary: Mapping[str, Any]) -> str:
    """Return the summary as Markdown."""
    lines = []
    for name, task in summary.items():
        lines += [
            f"## {name}",
            "",
            "| score | best, worst kept | halves: all, within | 4, 8, 16 questions | r with bias | length |",
        ]
        lines += ["|---|---|---|---|---|---|"]
        for key, row in task["scores"].items():
            if "halves" not in row:
                continue
            kept, halves = row["consistency"], row["halves"]
            cells = [
                f"{kept['best']:.0%}, {kept['worst']:.0%}",
                f"{halves['all']:.2f}, {halves['within']:.2f}",
                ", ".join(f"{few['all']:.2f}" for few in row["few questions"]),
            ]
            cells += [f"{row['bias']:+.2f}", f"{row['length']:+.2f}"]
            lines.append(f"| {' | '.join([key, *cells])} |")
        head = ["score", "one draft", "within its question", "one draft, less length"]
        if "base" in task:
            head += [f"groups alike, {outcome}" for outcome in ("probability", "forced", "written")]
            head += ["few parroted, forced"]
            head += ["best − worst, written", "best − worst, forced"]
        lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for key, row in task["scores"].items():
            cells = [_span(row["one draft"][of]) for of in ("all", "within", "less length")]
            if t := row.get("trained"):
                spans = [t[f"groups alike, {outcome}"] for outcome in ("probability_free", "forced", "right")]
                spans += [t.get("few parroted, forced")]
                cells += [_span(span) for span in spans]
                cells += [_span(t[f"best - worst, {outcome}"], 100) for outcome in ("right", "forced")]
            lines.append(f"| {' | '.join([key, *cells])} |")
        lines.append("")
    return "\n".join(lines)


def _span(values: Sequence[float] | None, scale: float = 1.0) -> str:
    if values is None:
        return ""
    digits = 1 if scale > 1 else 2
    middle, low, high = (scale * value for value in values[:3])
    return f"{middle:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def main() -> None:
    names = sorted(path.name.removesuffix("-grid.npz") for path in RESULTS.glob("*-grid.npz"))
    records = {name: Record(name) for name in names}
    summary = {name: of_task(record) for name, record in records.items()}
    write_atomic(RESULTS / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    write_atomic(RESULTS / "tables.md", tables(summary).encode())
    for name, record in records.items():
        if not record.base:
            continue
        if record.parroted.any():
            parrots_chart(record.share, record.outcome("right"), name)
        ends_chart(summary[name]["scores"], summary[name]["a die reaches"]["probability_free"], name)
    print(tables(summary))


if __name__ == "__main__":
    main()

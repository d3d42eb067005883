"""Does the engine that scores fastest order the drafts as the student's own file does?

    python benchmarks/studies/preference_precision.py record STUDENT.gguf        # two cores: 20 minutes
    python benchmarks/studies/preference_precision.py record CHECKPOINT          # with ARTE_EDGE_DTYPE=bfloat16: 6 min
    python benchmarks/studies/preference_precision.py report

Both record the preference set with drafts of the stronger teacher's grid
(`results/score_worth/home_intents-1.5b-work.json`): log-probabilities for those of the first `QUESTIONS`, texts for
those of `WRITTEN`. Killed, it goes on where it was; texts are compared where both have them. The report says how alike
the scores are, how often each question keeps its best and worst rationale, and how often two rationales that
differ by `align.min_gap` change sides.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from score_worth_grid import record
from score_worth_scores import UNASKED, Floats, draft_scores
from score_worth_stats import groups_of, spearman

from arte_edge.distill.config import Align
from arte_edge.runtimes.loader import open_engine
from arte_edge.stats import wilson

RESULTS = Path(__file__).parents[1] / "results"
WORK = RESULTS / "score_worth" / "home_intents-1.5b-work.json"
OUT = RESULTS / "preference_precision"
QUESTIONS, WRITTEN = 42, 16


def work() -> dict[str, Any]:
    """Return the drafts of the first questions, and the preference set in place of all validation questions."""
    whole: dict[str, Any] = json.loads(WORK.read_text("utf-8"))
    whole["drafts"] = [draft for draft in whole["drafts"] if draft["question"] < QUESTIONS]
    whole["validation"] = [whole["validation"][place] for place in whole["preferred"]]
    whole["preferred"] = list(range(len(whole["validation"])))
    return whole


def agreement(a: Floats, b: Floats, question: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return how alike two scores ``[d]`` of the same drafts are."""
    several = [places for places in groups_of(question) if len(places) > 1]
    best = sum(b[places][a[places].argmax()] >= b[places].max() for places in several)
    worst = sum(b[places][a[places].argmin()] <= b[places].min() for places in several)
    gap = Align.model_fields["min_gap"].default
    pairs = [(i, j) for places in several for i, j in combinations(places, 2) if abs(a[i] - a[j]) >= gap]
    turned = sum((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in pairs)
    return {
        "drafts": len(a),
        "spearman": round(spearman(a, b), 4),
        "largest difference": round(float(np.abs(a - b).max()), 4),
        "spread": round(float(a.std()), 4),
        "best kept": [int(best), len(several)],
        "worst kept": [int(worst), len(several)],
        "pairs turned": [int(turned), len(pairs), *(round(x, 4) for x in wilson(int(turned), len(pairs)))],
    }


def report() -> dict[str, Any]:
    one, two = (dict(np.load(OUT / f"{name}.npz")) for name in ("llamacpp-F16", "transformers-bfloat16"))
    asked = (one["right"] != UNASKED).all(1) & (two["right"] != UNASKED).all(1)
    found = {}
    for name, part in (("likelihood", np.ones_like(asked)), ("accuracy", asked)):
        grids = [
            {k: v[part] if k in ("logp", "right", "question", "tokens") else v for k, v in grid.items()}
            for grid in (one, two)
        ]
        scores = [draft_scores(grid) for grid in grids]
        for key in ("likelihood-free", "likelihood", "forced") if name == "likelihood" else ("accuracy",):
            found[key] = agreement(scores[0][key], scores[1][key], grids[0]["question"])
    same = (one["right"] == two["right"])[asked]
    found["accuracy"]["answers as right or wrong as before"] = [int(same.sum()), same.size]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("verb", choices=["record", "report"])
    parser.add_argument("student", nargs="?")
    options = parser.parse_args()
    if options.verb == "report":
        found = report()
        (OUT / "summary.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(json.dumps(found, indent=1))
        return
    engine = open_engine(options.student)
    OUT.mkdir(exist_ok=True)
    name = f"{engine.identity.kind}-{engine.identity.quantization}"
    record(work(), engine, OUT / f"{name}.npz", WRITTEN)


if __name__ == "__main__":
    main()

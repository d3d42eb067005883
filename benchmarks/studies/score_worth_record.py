"""One task's records of the study of scores: grid, influences, trained groups, and what a group is like."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from score_worth_scores import Floats
from score_worth_stats import partial, rate

from arte_edge.distill.generation.rationales import reject_repeated
from arte_edge.store import read_jsonl

__all__ = ["RESULTS", "Record", "entropy"]

RESULTS = Path(__file__).parents[1] / "results" / "score_worth"


class Record:
    """One task's grid, influences and trained groups."""

    def __init__(self, name: str) -> None:
        self.grid = dict(np.load(RESULTS / f"{name}-grid.npz"))
        effect = dict(np.load(RESULTS / f"{name}-influence.npz"))
        # Drafts that a student was trained on alone, what the grid has of them, and what the training did.
        self.alone = effect.get("places", np.arange(len(self.grid["question"])))
        by_draft = ("right", "logp", "question", "tokens", "own")
        self.part = self.grid | {key: self.grid[key][self.alone] for key in by_draft if key in self.grid}
        self.gain = effect["probability_free"]
        groups = RESULTS / f"{name}-groups.jsonl"
        rows = read_jsonl(groups) if groups.is_file() else []
        self.base = next((row for row in rows if row["part"] == "base"), None)
        self.runs = [row for row in rows if row["part"] != "base"]
        drafts = json.loads((RESULTS / f"{name}-work.json").read_text("utf-8"))["drafts"]
        marked = [{"question": str(d["question"]), "text": d["text"], "usable": True} for d in drafts]
        reject_repeated(marked)
        self.parroted = np.array([not row["usable"] for row in marked])
        self.answers = [draft["answer"] for draft in drafts]
        self.question = self.grid["question"]
        members = [row["members"] for row in self.runs]
        # What a group is like, whatever its drafts' scores: parroted share, spread of its labels (nats).
        self.share = np.array([self.parroted[m].mean() for m in members])
        self.spread = np.array([entropy([self.answers[i] for i in m]) for m in members])

    def outcome(self, which: str) -> Floats:
        return np.array([rate(row, which) for row in self.runs])

    def means(self, score: Floats) -> Floats:
        """Return each group's mean score."""
        return np.array([score[row["members"]].mean() for row in self.runs])

    def alike(self, means: Floats, outcome: Floats, at: Any = slice(None)) -> float:
        """Return how mean scores order an outcome over the groups `at`, parroted share and spread held constant."""
        return partial(means[at], outcome[at], [self.share[at], self.spread[at]])


def entropy(labels: Sequence[str]) -> float:
    """Return how evenly labels are spread, in nats."""
    shares = np.array(list(Counter(labels).values())) / len(labels)
    return float(-(shares * np.log(shares)).sum())

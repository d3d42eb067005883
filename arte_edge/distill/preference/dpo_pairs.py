"""Preference pairs for DPO: the questions and rationales that the student learns better from.

Question level: chosen and rejected answer the same question-generation prompt, drawn
from the top and the bottom quarter by score. Rationale level: a question's best and
worst rationale under the naive prompt (paper, section 3.4). Ties and near-ties carry no
preference and are dropped; lengths are reported, because DPO easily learns "longer".
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from arte_edge.distill.prompts import question_text

__all__ = ["draw_input_pairs", "draw_question_pairs", "draw_rationale_pairs", "length_report"]

Row = dict[str, Any]


def draw_question_pairs(
    questions: Sequence[Row], n_pair: int, per_answer: int, first_number: int, min_gap: float, seed: int
) -> tuple[list[Row], int]:
    """Return (pairs with chosen, rejected, gap; how many were dropped as ties).

    Each side holds up to `per_answer` questions, numbered from `first_number` in the tags that
    the prompt requires, without the prefilled opening.
    """
    ranked = sorted(questions, key=lambda row: (-row["score"], row["id"]))
    quarter = max(1, len(ranked) // 4)
    if len(ranked) < 2:
        return [], 0
    top, bottom = ranked[:quarter], ranked[-quarter:]
    n = min(per_answer, quarter)
    rng = random.Random(f"{seed}/question-pairs")
    pairs: list[Row] = []
    ties = 0
    for _ in range(n_pair):
        chosen, rejected = rng.sample(top, n), rng.sample(bottom, n)
        gap = float(np.mean([q["score"] for q in chosen]) - np.mean([q["score"] for q in rejected]))
        if gap < min_gap:
            ties += 1
            continue
        pairs.append(
            {
                "level": "question",
                "chosen": _listing(chosen, first_number),
                "rejected": _listing(rejected, first_number),
                "gap": round(gap, 6),
            }
        )
    return pairs, ties


def draw_input_pairs(
    questions: Sequence[Row], n_pair: int, per_answer: int, min_gap: float, seed: int
) -> tuple[list[Row], int]:
    """Return pairs of inputs that were written for one answer (label, chosen, rejected, gap), and the ties dropped.

    Each side holds up to `per_answer` inputs, from the better and from the worse half of that answer's. The
    answers take turns.
    """
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(questions, key=lambda row: (-row["score"], row["id"])):
        by_label[row["target"]].append(row)
    groups = [(label, rows) for label, rows in sorted(by_label.items()) if len(rows) > 1]
    rng = random.Random(f"{seed}/input-pairs")
    pairs: list[Row] = []
    ties = 0
    for i in range(n_pair if groups else 0):
        label, rows = groups[i % len(groups)]
        half = len(rows) // 2
        n = min(per_answer, half)
        chosen, rejected = rng.sample(rows[:half], n), rng.sample(rows[-half:], n)
        gap = float(np.mean([q["score"] for q in chosen]) - np.mean([q["score"] for q in rejected]))
        if gap < min_gap:
            ties += 1
            continue
        sides = {"chosen": [q["input"] for q in chosen], "rejected": [q["input"] for q in rejected]}
        pairs.append({"level": "question", "label": label, **sides, "gap": round(gap, 6)})
    return pairs, ties


def _listing(questions: Sequence[Row], first: int) -> str:
    text = "\n".join(question_text(i, q["input"], q["target"]) for i, q in enumerate(questions, first))
    return text.removeprefix(f"<Question_{first}><input>")


def draw_rationale_pairs(
    rationales: Sequence[Row], n_pair: int, min_gap: float, seed: int
) -> tuple[list[Row], int]:
    """Return (pairs with question id, chosen, rejected, gap; how many questions were dropped as ties)."""
    by_question: dict[str, list[Row]] = defaultdict(list)
    for row in rationales:
        by_question[row["question"]].append(row)
    pairs: list[Row] = []
    ties = 0
    for key, rows in by_question.items():
        best = max(rows, key=lambda row: (row["score"], -row["technique"]))
        worst = min(rows, key=lambda row: (row["score"], row["technique"]))
        gap = best["score"] - worst["score"]
        if gap < min_gap or best["text"] == worst["text"]:
            ties += 1
            continue
        pairs.append(
            {
                "level": "rationale",
                "question": key,
                "chosen": best["text"],
                "rejected": worst["text"],
                "gap": round(gap, 6),
            }
        )
    random.Random(f"{seed}/rationale-pairs").shuffle(pairs)
    return pairs[:n_pair], ties


def length_report(pairs: Sequence[Row]) -> dict[str, float]:
    """Return mean characters of chosen and rejected, and the share of pairs whose chosen is the longer."""
    if not pairs:
        return {"chosen_chars": 0.0, "rejected_chars": 0.0, "chosen_longer": 0.0}
    chosen = np.array([len(pair["chosen"]) for pair in pairs], dtype=float)
    rejected = np.array([len(pair["rejected"]) for pair in pairs], dtype=float)
    return {
        "chosen_chars": round(float(chosen.mean()), 1),
        "rejected_chars": round(float(rejected.mean()), 1),
        "chosen_longer": round(float((chosen > rejected).mean()), 4),
    }

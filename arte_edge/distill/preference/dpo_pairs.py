"""Preference pairs for DPO: the questions and rationales that the student learns better from.

Question level: chosen and rejected answer the same question-generation prompt, drawn from the top and the bottom of
the drafts by score. Rationale level: a question's best and worst rationale under the naive prompt (paper, section
3.4), and its second best and second worst. Each side is as long as its prompt says. Ties carry no preference and are
dropped: a gap below a fixed one, or below the standard error of the difference where the scores have one. Lengths are
reported, because DPO easily learns "longer". Some drafts are held out: pairs of them say whether the preference was
learned or the pairs by heart.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arte_edge.distill.prompts import question_text

Row = dict[str, Any]
_HOLD_OUT = 8  # one of so many questions is held out, one of so many drafts in a pair of single drafts
# Share of an answer's inputs at each end of their order that is set against the other end. A narrower end has fewer
# texts, a wider one a smaller gap; two ends of 27 % tell most, and a third hardly less (Kelley 1939).
_INPUT_END = 1 / 3
_LEAST = 2  # texts of an end, if there are so many: one would make all pairs of an answer the same
_QUESTION_END = 0.25  # the same of questions, if a side needs no more
_FEWEST = 4  # questions with rationale pairs, below which none is held out


@dataclass(frozen=True)
class Ties:
    """Which gaps are too small: below `gap`, or below `errors` standard errors of the difference."""

    gap: float
    errors: float = 0.0

    def hold(self, gap: float, *standard_errors: float) -> bool:
        """Return whether two sides whose scores are `gap` apart are a tie."""
        return gap < max(self.gap, self.errors * math.hypot(*standard_errors))


@dataclass(frozen=True)
class Drawn:
    """Pairs to train on, pairs to judge the training by, and how many were dropped as ties."""

    pairs: list[Row]
    held_out: list[Row]
    ties: int


def draw_question_pairs(
    questions: Sequence[Row], n_pair: int, per_side: int, first_number: int, ties: Ties, seed: int
) -> Drawn:
    """Return pairs with chosen, rejected, gap and n, the questions of a side.

    Each side holds `per_side` questions, fewer only where half of all are fewer, numbered from `first_number` in the
    tags that the prompt requires, without the prefilled opening. They come from the top and the bottom quarter, or
    from more of them where a quarter is too few.
    """

    def listed(pair: Row) -> Row:
        sides = {key: _listing(pair[key], first_number) for key in ("chosen", "rejected")}
        return {"level": "question", **pair, **sides}

    ranked = _ranked(questions)
    kept, held_out = _hold_out([ranked], ties, random.Random(f"{seed}/question-hold-out"))
    end = max(_QUESTION_END, per_side / max(len(kept[0]), 1))
    pairs, n_tie = _draw(kept, n_pair, per_side, end, ties, random.Random(f"{seed}/question-pairs"))
    return Drawn([listed(pair) for pair in pairs], [listed(pair) for pair in held_out], n_tie)


def draw_input_pairs(questions: Sequence[Row], n_pair: int, per_side: int, ties: Ties, seed: int) -> Drawn:
    """Return pairs of inputs that were written for one answer (label, chosen, rejected, gap, n).

    Each side holds `per_side` inputs, fewer only where an end (`_INPUT_END`) of that answer's is shorter, from the best
    and from the worst of them. The answers take turns.
    """

    def listed(pair: Row) -> Row:
        sides = {key: [row["input"] for row in pair[key]] for key in ("chosen", "rejected")}
        return {"level": "question", "label": pair["chosen"][0]["target"], **pair, **sides}

    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in _ranked(questions):
        by_label[row["target"]].append(row)
    groups = [rows for _, rows in sorted(by_label.items()) if len(rows) > 1]
    kept, held_out = _hold_out(groups, ties, random.Random(f"{seed}/input-hold-out"))
    pairs, n_tie = _draw(kept, n_pair, per_side, _INPUT_END, ties, random.Random(f"{seed}/input-pairs"))
    return Drawn([listed(pair) for pair in pairs], [listed(pair) for pair in held_out], n_tie)


def _ranked(questions: Sequence[Row]) -> list[Row]:
    return sorted(questions, key=lambda row: (-row["score"], row["id"]))


def _hold_out(groups: Sequence[list[Row]], ties: Ties, rng: random.Random) -> tuple[list[list[Row]], list[Row]]:
    """Take pairs of single drafts out of the halves of ranked `groups`; return what is left of them, and the pairs."""
    kept = [list(rows) for rows in groups]
    order = sorted(kept, key=len, reverse=True)
    pairs: list[Row] = []
    for turn in range(sum(map(len, kept)) // (2 * _HOLD_OUT)):
        rows = order[turn % len(order)]
        if (half := len(rows) // 2) < 2:
            continue
        better, worse = rng.choice(range(half)), len(rows) - half + rng.choice(range(half))
        if (pair := _pair([rows[better]], [rows[worse]], ties)) is not None:
            del rows[worse], rows[better]
            pairs.append(pair)
    return kept, pairs


def _draw(
    groups: Sequence[list[Row]], n_pair: int, per_side: int, end: float, ties: Ties, rng: random.Random
) -> tuple[list[Row], int]:
    """Draw pairs of sides from ranked `groups` in turn, from the first and the last `end` (a share) of a group."""
    groups = [rows for rows in groups if len(rows) > 1]
    pairs: list[Row] = []
    for i in range(n_pair if groups else 0):
        rows = groups[i % len(groups)]
        reach = min(max(int(end * len(rows) + 1e-9), _LEAST), len(rows) // 2)
        n = min(per_side, reach)
        pair = _pair(rng.sample(rows[:reach], n), rng.sample(rows[-reach:], n), ties)
        pairs += [] if pair is None else [pair]
    return pairs, (n_pair if groups else 0) - len(pairs)


def _pair(chosen: Sequence[Row], rejected: Sequence[Row], ties: Ties) -> Row | None:
    """Return a pair of two sides, None if it is a tie."""
    means = [float(np.mean([row["score"] for row in side])) for side in (chosen, rejected)]
    errors = [math.hypot(*(row.get("standard_error", 0.0) for row in side)) / len(side) for side in (chosen, rejected)]
    gap = means[0] - means[1]
    if ties.hold(gap, *errors):
        return None
    return {"chosen": chosen, "rejected": rejected, "gap": round(gap, 6), "n": len(chosen)}


def _listing(questions: Sequence[Row], first: int) -> str:
    text = "\n".join(question_text(i, q["input"], q["target"]) for i, q in enumerate(questions, first))
    return text.removeprefix(f"<Question_{first}><input>")


def draw_rationale_pairs(rationales: Sequence[Row], n_pair: int, per_question: int, ties: Ties, seed: int) -> Drawn:
    """Return pairs with question id, chosen, rejected, gap.

    The best and the worst rationale of every question come first, then its second best and second worst, as far as
    they are no ties and `n_pair` allows. Questions without any pair count as ties.
    """
    by_question: dict[str, list[Row]] = defaultdict(list)
    for row in rationales:
        by_question[row["question"]].append(row)
    found: dict[str, list[Row]] = {}
    for key, rows in by_question.items():
        ranked = sorted(rows, key=lambda row: (-row["score"], row["technique"]))
        pairs = (_pair([a], [b], ties) for a, b in zip(ranked[: len(rows) // 2], ranked[::-1], strict=False))
        texts = [
            {
                "level": "rationale",
                "question": key,
                "chosen": pair["chosen"][0]["text"],
                "rejected": pair["rejected"][0]["text"],
                "gap": pair["gap"],
            }
            for pair in pairs
            if pair is not None
        ]
        found[key] = [pair for pair in texts if pair["chosen"] != pair["rejected"]][:per_question]
    keys = [key for key, pairs in found.items() if pairs]
    random.Random(f"{seed}/rationale-pairs").shuffle(keys)
    n_held = len(keys) // _HOLD_OUT if len(keys) >= _FEWEST else 0
    ranks = range(per_question)
    kept = [found[key][rank] for rank in ranks for key in keys[n_held:] if rank < len(found[key])]
    held_out = [pair for key in keys[:n_held] for pair in found[key]]
    return Drawn(kept[:n_pair], held_out if n_pair else [], len(by_question) - len(keys))


def shuffle_sides(pairs: Sequence[Row], rng: random.Random) -> list[Row]:
    """Return the pairs with chosen and rejected swapped by lot: the control whose preference is random."""
    swapped = [{"chosen": p["rejected"], "rejected": p["chosen"], "gap": -p["gap"]} for p in pairs]
    return [pair | (swap if rng.random() < 0.5 else {}) for pair, swap in zip(pairs, swapped, strict=True)]


def length_report(pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
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

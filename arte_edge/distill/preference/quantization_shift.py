"""The effect of quantization on preference scores.

`prefer.student_file` scores drafts with a quantized file. A sample of drafts is scored by it and by the
16-bit student on the same questions, and the changes are compared with the standard error of the scores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.stats import pearson

__all__ = ["Shift", "compare", "sample_drafts"]

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


def sample_drafts(question: Sequence[Hashable], most: int) -> list[int]:
    """Return drafts of whole questions, at most `most`, evenly spread over the questions in their order."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for draft, key in enumerate(question):
        groups[key].append(draft)
    several = [drafts for drafts in groups.values() if len(drafts) > 1]
    if not several:
        return []
    n = max(1, min(len(several), most // max(map(len, several))))
    places = [(2 * i + 1) * len(several) // (2 * n) for i in range(n)]
    return [draft for place in places for draft in several[place]]


def _centred(score: Floats, groups: Sequence[NDArray[np.intp]]) -> Floats:
    parts = [score[drafts] - score[drafts].mean() for drafts in groups]
    return np.concatenate(parts) if parts else np.zeros(0)

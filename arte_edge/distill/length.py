"""What of a preference score a draft's length alone explains.

Longer examples score a little higher whatever they say, and a teacher that is aligned to such scores writes
longer and longer (for DPO in general: Park et al. 2024, arXiv 2403.19159). Where it was measured, a score without
that part orders drafts by what training on them does as well as the plain one does, and better within a question
(docs/score-worth.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["length_share"]

Floats = NDArray[np.float64]

_LEAST_DRAFTS = 12  # below, a slope is mostly chance


def length_share(score: Floats, tokens: Floats) -> Floats:
    """Return the part ``[d]`` of scores ``[d]`` that a straight line in the log of the length explains; its mean is 0.

    Nothing for a few drafts, or drafts of one length.
    """
    length = np.log(np.maximum(tokens, 1.0))
    length = length - length.mean()
    spread = float((length**2).sum())
    if len(score) < _LEAST_DRAFTS or spread < 1e-9:
        return np.zeros(len(score))
    return np.asarray(length * float((length * (score - score.mean())).sum()) / spread)

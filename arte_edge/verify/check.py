"""One thing that was compared, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """A measured value beside its threshold.

    `threshold` None means measured and not gated. `note` is one sentence: for a check
    that fails, what is most likely wrong; else what a reader should know, or empty.
    """

    name: str
    measured: float | None
    threshold: float | None
    passed: bool
    note: str = ""
    bound: Literal["at most", "at least"] = "at most"

    def as_dict(self) -> dict[str, Any]:
        """Return the check for JSON, which has no infinity: such a value becomes None."""
        finite = self.measured is not None and math.isfinite(self.measured)
        return {
            "name": self.name,
            "measured": self.measured if finite else None,
            "threshold": self.threshold,
            "bound": self.bound,
            "passed": self.passed,
            "note": self.note,
        }

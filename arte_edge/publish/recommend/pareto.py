"""The Pareto front of the files of one export: accuracy, speed and size on one device.

A file is on the front unless another dominates it: is at least as good in all three and better in one.
Files are compared only on axes that are known: where no accuracy was measured, the front is that of
speed and size, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.student_json import Artifact

__all__ = ["Candidate", "Evidence", "Metric", "ParetoFront", "pareto_front"]

Evidence = Literal["measured", "predicted"]
Axis = Literal["accuracy", "decode", "size"]


@dataclass(frozen=True)
class Metric:
    """One number of a file on a device: measured or predicted, and its source."""

    value: float
    evidence: Evidence
    source: str = ""

    @property
    def predicted(self) -> bool:
        return self.evidence == "predicted"


@dataclass(frozen=True)
class Candidate:
    """One exported file and what is known of it on the device; None: not known."""

    artifact: Artifact
    accuracy: PairedAccuracy | None = None
    decode: Metric | None = None  # tokens/s
    prefill: Metric | None = None  # tokens/s
    ram: Metric | None = None  # bytes
    answer_s: Metric | None = None  # seconds from the prompt to the last token
    notes: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        return self.artifact.file

    @property
    def speed(self) -> float:
        """The decode rate in tokens/s; 0 if it is not known."""
        return self.decode.value if self.decode else 0.0


@dataclass(frozen=True)
class ParetoFront:
    """`files` in order of falling speed; `axes`: what was compared; `left_out`: files that lack one of them."""

    files: tuple[str, ...]
    axes: tuple[Axis, ...]
    left_out: tuple[str, ...]


def pareto_front(candidates: Sequence[Candidate]) -> ParetoFront:
    """Return the front over what is known. An axis that no file has is dropped; a file that lacks one is left out."""
    axes: list[Axis] = ["size"]
    if any(c.decode for c in candidates):
        axes.insert(0, "decode")
    if any(c.accuracy for c in candidates):
        axes.insert(0, "accuracy")
    points = {c.file: _point(c, axes) for c in candidates}
    known = {file: point for file, point in points.items() if point is not None}
    on = [
        file
        for file, point in known.items()
        if not any(_dominates(other, point) for name, other in known.items() if name != file)
    ]
    speed = {c.file: c.speed for c in candidates}
    on.sort(key=lambda file: (-speed[file], file))
    return ParetoFront(tuple(on), tuple(axes), tuple(file for file, point in points.items() if point is None))


def _point(candidate: Candidate, axes: Sequence[Axis]) -> tuple[float, ...] | None:
    """Return the candidate's values, more is better; None if one is not known."""
    values = {
        "accuracy": candidate.accuracy.accuracy if candidate.accuracy else None,
        "decode": candidate.decode.value if candidate.decode else None,
        "size": -float(candidate.artifact.size_bytes),
    }
    point = [values[axis] for axis in axes]
    return None if any(value is None for value in point) else tuple(v for v in point if v is not None)


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))

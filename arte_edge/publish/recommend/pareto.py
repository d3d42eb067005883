"""The Pareto front of the files of one export: accuracy, speed and size on one device.

A file is on the front unless another dominates it: is at least as good in all three and better in one.
Files are compared only on known axes: where no accuracy was measured, the front is that of speed and size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.student_json import Artifact

__all__ = ["Candidate", "Evidence", "Metric", "ParetoFront", "pareto_front"]

Evidence = Literal["measured", "predicted"]
Axis = Literal["accuracy", "decode", "size"]
_AXES: tuple[Axis, ...] = get_args(Axis)


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
    values: dict[str, dict[Axis, float | None]] = {
        c.file: {
            "accuracy": c.accuracy.accuracy if c.accuracy else None,
            "decode": c.decode.value if c.decode else None,
            "size": -float(c.artifact.size_bytes),  # more is better on every axis
        }
        for c in candidates
    }
    axes = [
        axis for axis in _AXES if axis == "size" or any(found[axis] is not None for found in values.values())
    ]
    known = {
        file: tuple(v for axis in axes if (v := found[axis]) is not None) for file, found in values.items()
    }
    points = {file: point for file, point in known.items() if len(point) == len(axes)}
    speed = {c.file: c.speed for c in candidates}
    front = (file for file, p in points.items() if not any(_dominates(other, p) for other in points.values()))
    on = sorted(front, key=lambda file: (-speed[file], file))
    return ParetoFront(tuple(on), tuple(axes), tuple(file for file in values if file not in points))


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)

"""Which measurements are published: one rule for the card, its front matter, GGUF keys and the Hub.

A speed measured while the device was throttled reflects its cooling, not its speed; it is published
only on request. One measured while other work held the cores is never published, nor is an accuracy on
part of a split, which is for trying out, nor a file that the gate rejected.
"""

from __future__ import annotations

from collections.abc import Sequence

from arte_edge import catalog
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.rows import disturbance, left_out_notes
from arte_edge.results.student_json import Artifact, Evaluation, Speed, StudentFile


def files(student: StudentFile) -> list[Artifact]:
    """Return the files that passed the gate, largest first."""
    passed = (artifact for artifact in student.artifacts if artifact.status == "ok")
    return sorted(passed, key=lambda artifact: (-artifact.size_bytes, artifact.file))


def speeds(artifact: Artifact, allow_throttled: bool = False) -> list[Speed]:
    """Return the publishable speeds of a file, in a fixed order."""
    allowed = ("", "throttled") if allow_throttled else ("",)
    found = [speed for speed in artifact.speeds if speed.measured and disturbance(speed) in allowed]
    return sorted(found, key=lambda s: (s.device, s.fingerprint, s.runtime, s.threads, s.n_depth))


def left_out(student: StudentFile, allow_throttled: bool = False) -> tuple[str, ...]:
    """Return a sentence for each reason why speeds are not published."""
    kinds = [kind for artifact in files(student) for speed in artifact.speeds for kind in speed.disturbances]
    return left_out_notes(kind for kind in kinds if not (allow_throttled and kind == "throttled"))


def evaluations(found: Sequence[Evaluation]) -> list[Evaluation]:
    """Return those on a whole split, the test split first."""
    whole = [one for one in found if not one.partial]
    return sorted(whole, key=lambda e: (e.split != "test", e.task, e.device, e.fingerprint, e.runtime))


def accuracies(of: Artifact | StudentFile) -> list[PairedAccuracy]:
    """Return every publishable accuracy of a file, or of the 16-bit student: on devices, then the gate's."""
    if isinstance(of, Artifact):
        found, gate = of.evaluations, of.accuracy
    else:
        found, gate = of.student_evaluations, of.student_accuracy
    return [*evaluations(found), *([gate] if gate else [])]


def accuracy_on(artifact: Artifact, fingerprint: str) -> Evaluation | None:
    """Return the accuracy that was measured on the device with this fingerprint, the test split's if there is one."""
    mine = (one for one in evaluations(artifact.evaluations) if one.fingerprint == fingerprint)
    return next(mine, None)


def device_title(speed: Speed | Evaluation) -> str:
    """Return what a device may be called in public: its kind and processor, never the name that its owner gave it."""
    cpu = speed.cpu if isinstance(speed, Speed) else ""
    if speed.device in catalog.names("devices"):
        return speed.device
    return cpu or f"device {speed.fingerprint or speed.device}"

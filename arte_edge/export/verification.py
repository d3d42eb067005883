"""Hold each file against the 16-bit student, once: a verdict is kept until file, prompts or limits change.

The student is opened when the first file needs it and stays open for the rest, since
what it writes and computes is the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from arte_edge import __version__
from arte_edge.cache import Progress
from arte_edge.export.build_cache import Made, Workshop
from arte_edge.export.recipe import Recipe
from arte_edge.export.source import Source
from arte_edge.models.formats import Format
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.student_json import SCHEMA_VERSION, Artifact, Check, Fidelity, FidelityMetrics, Student
from arte_edge.runtimes.loader import open_model
from arte_edge.runtimes.protocol import Runtime

__all__ = ["Judge", "reference_accuracy"]


@dataclass
class Judge:
    """Judges the files of one export. Close it: the student takes four bytes a parameter."""

    workshop: Workshop
    source: Source
    student: Student
    recipe: Recipe
    progress: Progress | None = None
    was_kept: bool = False  # whether the last verdict is an earlier start's
    _reference: Runtime | None = field(default=None, repr=False)

    def judge(self, format: Format, made: Made) -> dict[str, Any]:
        """Return the gate's verdict on one file, as `Verdict.as_dict` gives it.

        Raises:
            ArteError: a runtime is missing or failed, which says nothing about the file.
        """
        settings, limits = self.recipe.verify, self.recipe.verify.limits(format)
        task = self.source.task if settings.examples else None
        inputs = [
            __version__,
            SCHEMA_VERSION,  # of the verdict, which is kept as JSON
            made.sums.sha256,
            self.student.sha256,
            list(self.source.prompts),
            limits.model_dump(mode="json"),
            [task.sha256, settings.examples] if task else None,
            self.source.plain,
        ]
        step = f"verify-{format.label}"
        known = self.workshop.recall(step, inputs)
        self.was_kept = known is not None
        if known is not None:
            return known
        from arte_edge.verify.gate import verify_file

        found = verify_file(
            self._opened(),
            made.path,
            self.source.prompts,
            limits,
            task=task,
            limit=settings.examples,
            plain=self.source.plain,
            progress=self.progress,
        )
        verdict = found.as_dict() | {"reason": found.reason}
        self.workshop.note(step, inputs, verdict)
        return verdict

    def artifact(self, format: Format, made: Made, verdict: Mapping[str, Any], imatrix: str) -> Artifact:
        """Return the entry of ``student.json`` for a file that was judged. `imatrix` is the matrix's sha256."""
        name = format.file_name(self.student.name) + ("" if verdict["passed"] else ".rejected")
        summary = made.summary
        bits = summary.get("bits_per_weight") or 8 * made.sums.tensor_bytes / self.student.parameter_count
        return Artifact(
            file=name + "/" if format.is_folder else name,
            format=format.family,
            quantization=format.type,
            arch=format.arch,
            status="ok" if verdict["passed"] else "rejected",
            reason=verdict["reason"],
            size_bytes=made.sums.size_bytes,
            sha256=made.sums.sha256,
            tensor_sha256=made.sums.tensor_sha256,
            parts=made.sums.parts,
            bits_per_weight=round(bits, 4),
            tensor_types=summary.get("tensor_types", {}),
            imatrix_sha256=imatrix if summary.get("imatrix_used") else "",
            notes=tuple(_notes(summary)),
            fidelity=self._fidelity(verdict),
            accuracy=_accuracy(verdict),
        )

    def _fidelity(self, verdict: Mapping[str, Any]) -> Fidelity:
        metrics = verdict["fidelity"]
        runtimes = verdict.get("runtimes") or ["", ""]
        return Fidelity(
            passed=verdict["passed"],
            prompts_from=self.source.prompts_from,
            runtime=runtimes[1],
            reference_runtime=runtimes[0],
            metrics=None if metrics is None else FidelityMetrics(**_finite(metrics)),
            checks=tuple(Check(**check) for check in verdict["checks"]),
        )

    def _opened(self) -> Runtime:
        if self._reference is None:
            if self.progress:
                self.progress("opening the student", 0, 1)
            self._reference = open_model(self.source.checkpoint)
        return self._reference

    def close(self) -> None:
        if self._reference is not None:
            self._reference.close()
            self._reference = None


def reference_accuracy(verdict: Mapping[str, Any]) -> PairedAccuracy | None:
    """Return the accuracy of the 16-bit student in a verdict; None if it was not measured."""
    found = _accuracy(verdict)
    return found.reference_alone if found else None


def _accuracy(verdict: Mapping[str, Any]) -> PairedAccuracy | None:
    found = verdict.get("accuracy")
    return PairedAccuracy(**found) if found else None


def _notes(summary: Mapping[str, Any]) -> list[str]:
    """Return in words what a file's name does not say: tensors of another type, and warnings."""
    swaps: dict[str, int] = {}
    for fallback in summary.get("fallbacks", ()):
        swap = fallback.partition(": ")[2]
        swaps[swap] = swaps.get(swap, 0) + 1
    notes = []
    for swap, count in swaps.items():
        wanted, _, got = swap.partition(" -> ")
        place = "" if " " in wanted else f" in place of {wanted}"  # llama.cpp does not always tell
        tensors = "1 tensor" if count == 1 else f"{count} tensors"
        notes.append(f"{tensors} became {got}{place}: 256 does not divide the rows")
    return [*notes, *summary.get("warnings", ())]


def _finite(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics for JSON, which has no NaN (one prompt alone has no standard error)."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in metrics.items()
    }

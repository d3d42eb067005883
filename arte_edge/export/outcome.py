"""What an export will make and what it made, and how both are shown: one table row a file, then the details.

The estimate is that of ``--dry-run``: files, their sizes, disk space and memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.cache import megabytes
from arte_edge.errors import ArteError
from arte_edge.export.build import needs_imatrix, uses_base
from arte_edge.export.recipe import Recipe
from arte_edge.export.source import Source
from arte_edge.gguf.quantize import quality_warning
from arte_edge.gguf.reader import find_type
from arte_edge.models.artifact import Format, overhead_bytes, predicted_bytes
from arte_edge.results.accuracy import NOT_KNOWN
from arte_edge.results.student_json import FILE_NAME, Artifact, FidelityMetrics, StudentFile

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_GIGABYTE = 1_000_000_000


@dataclass(frozen=True)
class FileEstimate:
    """The predicted size of one format's file or folder."""

    format: Format
    size_bytes: int
    bits_per_weight: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """The predicted disk space and memory of an export."""

    files: tuple[FileEstimate, ...]
    base_bytes: int  # of a 16-bit GGUF that is removed at the end; 0 without one
    memory_bytes: int
    memory_step: str
    imatrix: bool

    @property
    def disk_bytes(self) -> int:
        """Largest disk space used at any time."""
        return self.base_bytes + sum(file.size_bytes for file in self.files)

    def table(self, model: str) -> Table:
        """Return the files of `model` as a table."""
        from rich import box

        from arte_edge.console import ResultTable

        table = ResultTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("file", overflow="fold")
        for name in ("size", "bits/w"):
            table.add_column(name, justify="right", no_wrap=True)
        for file in self.files:
            name = file.format.file_name(model)
            table.add_row(name, megabytes(file.size_bytes), f"{file.bits_per_weight:.1f}")
        if self.base_bytes:
            table.add_row("16-bit GGUF, removed at the end", megabytes(self.base_bytes), "")
        table.add_section()
        table.add_row("total at most", megabytes(self.disk_bytes), "", style="bold")
        return table

    def notes(self, source: Source, folder: Path) -> list[str]:
        """Return folder, memory, importance matrix and prompts of the export, and warnings."""
        matrix = (
            f"Importance matrix from {len(source.training)} {source.training_from}."
            if self.imatrix
            else "No importance matrix: none of these types uses one, or there are no training texts (--task)."
        )
        return [
            f"Folder: {folder}. Memory: about {megabytes(self.memory_bytes)} for {self.memory_step} (rough).",
            matrix,
            f"Verified on {len(source.prompts)} prompts: {source.prompts_from}.",
            *source.notes,
            *(note for file in self.files for note in file.notes),
        ]

    def as_dict(self, source: Source, folder: Path) -> dict[str, Any]:
        """Return the estimate for JSON."""
        files = [
            {
                "file": file.format.file_name(source.name),
                "format": file.format.family,
                "quantization": file.format.type,
                "size_bytes": file.size_bytes,
                "bits_per_weight": round(file.bits_per_weight, 2),
                "notes": list(file.notes),
            }
            for file in self.files
        ]
        return {
            "event": "plan",
            "folder": str(folder),
            "artifacts": files,
            "base_bytes": self.base_bytes,
            "disk_bytes": self.disk_bytes,
            "memory_bytes_rough": self.memory_bytes,
            "memory_step": self.memory_step,
            "imatrix": self.imatrix,
            "notes": self.notes(source, folder),
        }


def estimate(
    shapes: Mapping[str, tuple[int, ...]], formats: Sequence[Format], recipe: Recipe, *, n_training: int
) -> Estimate:
    """Estimate the export of a checkpoint with tensors of these `shapes` and a number of training texts."""
    n_parameter = sum(math.prod(shape) for shape in shapes.values())
    imatrix = recipe.gguf.imatrix and n_training > 0 and any(map(needs_imatrix, formats))
    base = Format("gguf", recipe.gguf.base)
    converts = any(uses_base(format, base.type) for format in formats)
    step, memory = max(_memory(formats, shapes, n_parameter, imatrix).items(), key=lambda item: item[1])
    return Estimate(
        files=tuple(_file(format, shapes, n_parameter) for format in formats),
        base_bytes=predicted_bytes(base, shapes) if converts and base not in formats else 0,
        memory_bytes=memory,
        memory_step=step,
        imatrix=imatrix,
    )


def _file(format: Format, shapes: Mapping[str, tuple[int, ...]], n_parameter: int) -> FileEstimate:
    size = predicted_bytes(format, shapes)
    note = quality_warning(find_type(format.type), n_parameter) if format.family == "gguf" else None
    bits = 8 * (size - overhead_bytes(format, shapes)) / n_parameter
    return FileEstimate(format, size, bits, (note,) if note else ())


def _memory(
    formats: Sequence[Format], shapes: Mapping[str, tuple[int, ...]], n_parameter: int, imatrix: bool
) -> dict[str, int]:
    """Return the rough peak memory of each step in bytes."""
    largest = max(math.prod(shape) for shape in shapes.values())
    verify = 4 * n_parameter + max(predicted_bytes(format, shapes) for format in formats) + _GIGABYTE
    steps = {"verifying": verify}
    if any(format.family == "gguf" for format in formats):
        steps["quantizing"] = 4 * n_parameter + 6 * largest + 700_000_000
    if imatrix:
        steps["importance matrix"] = 4 * n_parameter + _GIGABYTE
    if any(format.family == "onnx-genai" for format in formats):
        steps["building ONNX"] = 6 * n_parameter + _GIGABYTE
    if any(format.family == "onnx-optimum" for format in formats):
        steps["building ONNX"] = 15 * n_parameter + _GIGABYTE
    return steps


@dataclass(frozen=True)
class Failure:
    """A format that could not be built or verified; a file that fails verification is not one of these."""

    format: Format
    error: ArteError


@dataclass(frozen=True)
class Outcome:
    """The files of an export in `folder`. `artifacts` are those of this call, in the order of the formats."""

    student: StudentFile
    artifacts: tuple[Artifact, ...]
    failures: tuple[Failure, ...] = ()
    folder: Path = Path()

    @property
    def rejected(self) -> tuple[Artifact, ...]:
        return tuple(artifact for artifact in self.artifacts if artifact.status == "rejected")

    @property
    def table(self) -> Table:
        """The files: size, divergence from the student, accuracy, verdict.

        Every file name begins with the model's name, which is left out so that rows fit into 80 columns.
        """
        from rich import box
        from rich.text import Text

        from arte_edge.console import ResultTable

        has_accuracy = any(artifact.accuracy for artifact in self.artifacts)
        has_answers = any(a.fidelity.metrics and a.fidelity.metrics.answers for a in self.artifacts)
        table = ResultTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("file", overflow="fold")
        more = [*(["answers"] if has_answers else []), "top-1", *(["accuracy"] if has_accuracy else [])]
        for name in ("size", "bits/w", "KL", *more):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for artifact in self.artifacts:
            metrics = artifact.fidelity.metrics
            cells = [
                f"…{artifact.file.removeprefix(self.student.student.name)}",
                megabytes(artifact.size_bytes),
                f"{artifact.bits_per_weight:.2f}",
                _kl(metrics),
                *([_kl(metrics.answers if metrics else None)] if has_answers else []),
                NOT_KNOWN if metrics is None else f"{metrics.top1:.1%}",
            ]
            if has_accuracy:
                cells.append(artifact.accuracy.percent if artifact.accuracy else NOT_KNOWN)
            verdict = Text("ok", "green") if artifact.status == "ok" else Text("rejected", "bold red")
            table.add_row(*cells, verdict)
        return table

    @property
    def details(self) -> list[str]:
        """Lines below the table: what was compared, why files were rejected, notes, and the folder."""
        lines: list[str] = []
        compared = next((a.fidelity for a in self.artifacts if a.fidelity.metrics), None)
        if compared and (n := compared.metrics):
            lines.append(
                f"Compared with the 16-bit student on {n.n_tokens} tokens of {n.n_prompts} prompts "
                f"({compared.prompts_from}). KL in nats per token; of answers where they decide."
            )
        if own := self.student.student_accuracy:
            lines.append(
                f"Accuracy of the 16-bit student: {own.percent} on {own.n} {own.split} examples of "
                f"{own.task}. Intervals are 95 %."
            )
        for artifact in self.artifacts:
            lines += [f"{artifact.file}: {note}" for note in artifact.notes]
        for artifact in self.rejected:
            reasons = (f"  {line}" for line in artifact.reason.splitlines())
            lines += ["", f"{artifact.file} failed verification:", *reasons]
        for failure in self.failures:
            lines += ["", f"{failure.format.label} could not be built: {failure.error.message}"]
            lines += [f"  {line}" for line in failure.error.hint.splitlines()]
        return [*lines, "", f"Files: {self.folder} (details of each: {self.folder / FILE_NAME})"]

    def show(self, console: Console) -> None:
        """Print the table and the details."""
        student = self.student.student
        title = f"{student.name}: {student.parameter_count / 1e6:.0f} million parameters, {student.dtype}"
        console.print(title, style="bold", soft_wrap=True)
        if self.artifacts:
            console.print(self.table)
        for line in self.details:
            console.print(line, soft_wrap=True)

    def _repr_html_(self) -> str:
        from arte_edge.console import fragment

        return fragment(self.student.student.name, [self.table], self.details)


def _kl(metrics: FidelityMetrics | None) -> str:
    return NOT_KNOWN if metrics is None or metrics.kl_mean is None else f"{metrics.kl_mean:.4f}"

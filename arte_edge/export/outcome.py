"""The result of an export, and how it is shown: one table row a file, in 80 columns, then the details."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arte_edge.cache import megabytes
from arte_edge.errors import ArteError
from arte_edge.models.artifact import Format
from arte_edge.results.accuracy import NOT_KNOWN
from arte_edge.results.student_json import FILE_NAME, Artifact, FidelityMetrics, StudentFile

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


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

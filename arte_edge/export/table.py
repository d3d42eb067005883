"""The last words of an export: one line a file, in 80 columns, and below it what is behind the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from arte_edge.cache import megabytes
from arte_edge.export.pipeline import Outcome
from arte_edge.notebook import ResultTable
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.student_json import FILE_NAME, Artifact

__all__ = ["artifact_table", "show_outcome", "summary_lines"]

_DASH = "–"


def show_outcome(console: Console, outcome: Outcome, out: Path) -> None:
    """Print the table of an export's files and what a reader must know of it."""
    student = outcome.student.student
    title = f"{student.name}: {student.parameter_count / 1e6:.0f} million parameters, {student.dtype}"
    console.print(title, markup=False, style="bold", soft_wrap=True)
    if outcome.artifacts:
        console.print(artifact_table(outcome.artifacts, student.name))
    for line in summary_lines(outcome, out):
        console.print(line, markup=False, soft_wrap=True)


def artifact_table(artifacts: Sequence[Artifact], model: str) -> Table:
    """Return the table. The model's name, with which every file's begins, is left out to fit into 80 columns."""
    has_accuracy = any(artifact.accuracy for artifact in artifacts)
    table = ResultTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("file", overflow="fold")
    for name in ("size", "bits/w", "KL", "top-1", *(["accuracy"] if has_accuracy else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for artifact in artifacts:
        accepted = artifact.status == "ok"
        metrics = artifact.fidelity.metrics
        cells = [
            f"…{artifact.file.removeprefix(model)}",
            megabytes(artifact.size_bytes),
            f"{artifact.bits_per_weight:.2f}",
            _DASH if metrics is None or metrics.kl_mean is None else f"{metrics.kl_mean:.4f}",
            _DASH if metrics is None else f"{metrics.top1:.1%}",
        ]
        if has_accuracy:
            cells.append(_accuracy(artifact.accuracy))
        table.add_row(*cells, "[green]ok[/]" if accepted else "[bold red]rejected[/]")
    return table


def _accuracy(found: PairedAccuracy | None) -> str:
    return _DASH if found is None else f"{found.accuracy:.0%} ({100 * found.low:.0f}–{100 * found.high:.0f})"


def summary_lines(outcome: Outcome, out: Path) -> list[str]:
    """Return what stands under the table: what was compared, reasons, notes, and where everything is."""
    lines: list[str] = []
    compared = next((a.fidelity for a in outcome.artifacts if a.fidelity.metrics), None)
    if compared and compared.metrics:
        n = compared.metrics
        lines.append(
            f"Against the 16-bit student on {n.n_tokens} tokens of {n.n_prompts} prompts "
            f"({compared.prompts_from}). KL in nats a token."
        )
    if own := outcome.student.student_accuracy:
        lines.append(
            f"The student itself: {own.accuracy:.0%} ({100 * own.low:.0f}–{100 * own.high:.0f}) of {own.n} "
            f"{own.split} examples of {own.task}. Intervals are 95 %."
        )
    for artifact in outcome.artifacts:
        lines += [f"{artifact.file}: {note}" for note in artifact.notes]
    for artifact in outcome.rejected:
        lines += [
            "",
            f"{artifact.file} is not the student:",
            *(f"  {r}" for r in artifact.reason.splitlines()),
        ]
    for failure in outcome.failures:
        lines += ["", f"{failure.format.label} could not be made: {failure.error.message}"]
        lines += [f"  {line}" for line in failure.error.hint.splitlines()]
    lines += ["", f"Everything: {out} (what it is and how close: {out / FILE_NAME})"]
    return lines

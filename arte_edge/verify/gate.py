"""The gate: everything that must hold before an exported file may be called the student.

    verdict = verify(open_model(checkpoint), open_model(gguf), prompts, thresholds_for("Q4_K_M"))
    if not verdict.passed:
        print(verdict.reason)

The checks, in this order: ``opens``, which a file shows only by failing it; ``tokens``,
``vocabulary``, ``template``, ``template ids`` and ``stop tokens``, which decide what the
model reads and where it ends; ``kl mean``, ``kl p99``, ``top-1 agreement`` and
``perplexity ratio``, which say what the weights have lost; ``accuracy drop``, which says
whether it matters. All are run even if one fails: a user mends more than one fault at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.errors import InputError
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.runtimes.loader import open_model
from arte_edge.runtimes.protocol import Runtime
from arte_edge.tasks.task import Task
from arte_edge.verify.accuracy import check_accuracy, measure_accuracy
from arte_edge.verify.chat_template import check_templates
from arte_edge.verify.check import Check, checks_table, long_notes
from arte_edge.verify.corpus import hard_strings
from arte_edge.verify.logits import Fidelity, Progress, fidelity_checks, measure_fidelity
from arte_edge.verify.thresholds import STRICTEST, TYPES, Thresholds, thresholds_for
from arte_edge.verify.tokenizer import check_stops, check_tokens, check_vocabulary

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Check", "Thresholds", "Verdict", "verify", "verify_file"]


@dataclass(frozen=True)
class Verdict:
    """What the gate found. `fidelity` and `accuracy` hold the figures behind the checks, if they were measured."""

    passed: bool
    checks: tuple[Check, ...]
    fidelity: Fidelity | None = None
    accuracy: PairedAccuracy | None = None
    reference: str = ""
    artifact: str = ""
    judged_as: str = ""  # the quantization type whose limits were taken; empty if they were given
    runtimes: tuple[str, str] = field(default=("", ""))
    notes: tuple[str, ...] = ()  # what limits the comparison itself

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    @property
    def reason(self) -> str:
        """Why it failed, a sentence a check; empty if it passed."""
        return "\n".join(f"{check.name}: {check.note}" for check in self.failed)

    @property
    def table(self) -> Table:
        """The checks with what was measured and their limits."""
        return checks_table(self.checks)

    def _repr_html_(self) -> str:
        from arte_edge.notebook import fragment

        verdict = "is" if self.passed else "is not"
        limits = f", by the limits of {self.judged_as}" if self.judged_as else ""
        title = f"{self.artifact} {verdict} {self.reference}{limits}"
        return fragment(title, [self.table], [*self.notes, *long_notes(self.checks)])

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict for JSON and for student.json; no paths in it."""
        figures = None
        if self.fidelity is not None:
            finite = ((k, v) for k, v in asdict(self.fidelity).items())
            figures = {k: v if abs(v) < float("inf") else None for k, v in finite}
        return {
            "passed": self.passed,
            "reference": self.reference,
            "artifact": self.artifact,
            "judged_as": self.judged_as,
            "runtimes": list(self.runtimes),
            "checks": [check.as_dict() for check in self.checks],
            "fidelity": figures,
            "accuracy": None if self.accuracy is None else self.accuracy.model_dump(mode="json"),
        }


def verify(
    reference: Runtime,
    artifact: Runtime,
    prompts: Sequence[str],
    thresholds: Thresholds,
    *,
    task: Task | None = None,
    limit: int = 0,
    final: bool = False,
    plain: bool = False,
    progress: Progress | None = None,
) -> Verdict:
    """Compare `artifact` with `reference`, the 16-bit model that it was made from.

    Args:
        reference: opened checkpoint (or its F16 GGUF).
        artifact: the opened file to judge.
        prompts: rendered held-out prompts, on which logits are compared; never training text.
        thresholds: `thresholds_for` a quantization type, or a recipe's own.
        task: where given, both answer its validation examples.
        limit: of the task's examples; 0 takes all.
        final: this is the final evaluation: use the test split.
        plain: the student was tuned on plain text, so it is asked without its chat template.
        progress: called with (step, done, total).

    Raises:
        InputError: no usable prompts, or an empty split.
        ArteError: a runtime failed, or the reference itself is damaged.
    """
    if progress is not None:
        progress("comparing tokens", 0, 1)
    checks = [
        check_tokens(reference, artifact, hard_strings(reference.added_tokens), thresholds),
        check_vocabulary(reference, artifact, thresholds),
        *check_templates(reference, artifact, thresholds),
        check_stops(reference, artifact, thresholds.stop_differences),
    ]
    fidelity = accuracy = None
    if artifact.n_vocab < min(reference.n_vocab, _largest(reference, prompts) + 1):
        note = f"The artifact has {artifact.n_vocab} tokens, the prompts use more of {reference.n_vocab}."
        checks.append(Check("vocabulary size", artifact.n_vocab, reference.n_vocab, False, note, "at least"))
    else:
        fidelity = measure_fidelity(reference, artifact, prompts, progress)
        checks += fidelity_checks(fidelity, thresholds)
    if task is not None:
        accuracy = measure_accuracy(
            reference, artifact, task, limit, final=final, plain=plain, progress=progress
        )
        checks.append(check_accuracy(accuracy, thresholds.accuracy_drop))
    return Verdict(
        passed=all(check.passed for check in checks),
        checks=tuple(checks),
        fidelity=fidelity,
        accuracy=accuracy,
        reference=reference.name,
        artifact=artifact.name,
        runtimes=(reference.facts.runtime, artifact.facts.runtime),
    )


def verify_file(
    reference: Runtime,
    artifact: Path,
    prompts: Sequence[str],
    thresholds: Thresholds | None = None,
    *,
    task: Task | None = None,
    limit: int = 0,
    final: bool = False,
    plain: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Open the file or folder `artifact` and `verify` it; one that does not open fails the check ``opens``.

    Without `thresholds` those of the type that the file says it is are taken, the
    strictest if it does not say.

    Raises:
        FileNotFoundError: nothing is there, which says nothing about a model.
        ArteError: as `verify`, or the runtime for it is not installed.
    """
    if not artifact.exists():
        raise FileNotFoundError(artifact)
    try:
        model = open_model(artifact, threads)
    except InputError as error:
        note = error.message.replace(str(artifact), artifact.name)
        return Verdict(
            False, (Check("opens", None, None, False, note),), None, None, reference.name, artifact.name
        )
    try:
        judged_as = ""
        if thresholds is None:
            judged_as = model.quantization if model.quantization in TYPES else STRICTEST
            thresholds = thresholds_for(judged_as)
        verdict = verify(
            reference,
            model,
            prompts,
            thresholds,
            task=task,
            limit=limit,
            final=final,
            plain=plain,
            progress=progress,
        )
        return replace(verdict, judged_as=judged_as)
    finally:
        model.close()


def _largest(reference: Runtime, prompts: Sequence[str]) -> int:
    return max((token for prompt in prompts for token in reference.tokenize(prompt)), default=0)

"""The fidelity gate: all checks that an exported file must pass.

The checks, in this order: ``opens`` (listed only if it fails); ``tokens``, ``vocabulary``, ``template``,
``template ids``, ``template programs`` and ``stop tokens`` on the text side; ``kl mean``, ``kl p99``, ``top-1
agreement`` and ``perplexity ratio`` on the weights, with a task also where the student writes its answers; ``as
asked`` and ``accuracy drop`` on a task. All are run even if one fails.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from arte_edge.errors import InputError
from arte_edge.onnx.files import GENAI
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.runtimes.loader import open_model
from arte_edge.runtimes.protocol import Runtime
from arte_edge.tasks.task import Task
from arte_edge.verify.accuracy import (
    answer_examples,
    check_accuracy,
    check_as_asked,
    examples_of,
    measure_accuracy,
    noted_tokens,
    questions_for,
)
from arte_edge.verify.chat_template import check_templates
from arte_edge.verify.check import STRICTEST, TYPES, Check, Thresholds, checks_table, long_notes, thresholds_for
from arte_edge.verify.logits import Fidelity, Progress, fidelity_checks, measure_answers, measure_fidelity
from arte_edge.verify.tokenizer import check_stops, check_tokens, check_vocabulary, hard_strings

if TYPE_CHECKING:
    from rich.table import Table

_COMPARED_ANSWERS = 48


@dataclass(frozen=True)
class Verdict:
    """The result of all checks. `fidelity` and `accuracy` hold the metrics behind them, if measured."""

    passed: bool
    checks: tuple[Check, ...]
    fidelity: Fidelity | None = None
    accuracy: PairedAccuracy | None = None
    reference: str = ""
    artifact: str = ""
    thresholds_of: str = ""  # quantization type whose thresholds were used; empty if they were given
    runtimes: tuple[str, str] = field(default=("", ""))
    notes: tuple[str, ...] = ()  # limitations of the comparison

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    @property
    def reason(self) -> str:
        """Why it failed, one line a check; empty if it passed."""
        return "\n".join(f"{check.name}: {check.note}" for check in self.failed)

    @property
    def table(self) -> Table:
        """The checks with measured values and thresholds."""
        return checks_table(self.checks)

    def _repr_html_(self) -> str:
        from arte_edge.console import fragment

        verdict = "matches" if self.passed else "does not match"
        thresholds = f", thresholds of {self.thresholds_of}" if self.thresholds_of else ""
        title = f"{self.artifact} {verdict} {self.reference}{thresholds}"
        return fragment(title, [self.table], [*self.notes, *long_notes(self.checks)])

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict for JSON and student.json: no paths, None for values that are not finite."""
        found = {
            "passed": self.passed,
            "reference": self.reference,
            "artifact": self.artifact,
            "judged_as": self.thresholds_of,
            "runtimes": self.runtimes,
            "checks": self.checks,
            "fidelity": self.fidelity,
            "accuracy": self.accuracy,
        }
        document: dict[str, Any] = json.loads(TypeAdapter(dict[str, Any]).dump_json(found))
        return document


def verify(
    reference: Runtime,
    artifact: Runtime,
    prompts: Sequence[str],
    thresholds: Thresholds,
    *,
    task: Task | None = None,
    limit: int = 0,
    final: bool = False,
    answer_tokens: int = 0,
    progress: Progress | None = None,
) -> Verdict:
    """Compare `artifact` with `reference`, the 16-bit model that it was made from.

    Args:
        reference: the opened checkpoint (or its F16 GGUF).
        artifact: the opened file.
        prompts: rendered held-out prompts for comparing logits; never training texts.
        thresholds: `thresholds_for` a quantization type, or a recipe's.
        task: both models answer its validation examples.
        limit: number of examples; 0: all.
        final: final evaluation: use the test split.
        answer_tokens: budget of an answer; 0: from the task.
        progress: called with (step, done, total).

    Raises InputError: no usable prompts, or an empty split;
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
    largest = max((token for prompt in prompts for token in reference.tokenize(prompt)), default=0)
    if artifact.n_vocab < min(reference.n_vocab, largest + 1):
        note = f"The artifact has {artifact.n_vocab} tokens, the prompts use ids up to {largest}."
        checks.append(Check("vocabulary size", artifact.n_vocab, reference.n_vocab, False, note, "at least"))
    else:
        fidelity = measure_fidelity(reference, artifact, prompts, progress)
    answering: list[Check] = []
    if task is not None:
        asked = questions_for(reference, task, answer_tokens)
        accuracy = measure_accuracy(reference, artifact, task, limit, final=final, questions=asked, progress=progress)
        examples = examples_of(task, limit, final=final)
        allowed = thresholds.template_differences
        answering = [
            check_as_asked(reference, artifact, task, asked, examples, allowed, progress),
            check_accuracy(accuracy, thresholds.accuracy_drop),
        ]
        if fidelity is not None and thresholds.drift != 1:
            own = answer_examples(reference, examples[:_COMPARED_ANSWERS], asked)  # known from above
            written = [(one.prompt, asked.unstopped(one.text)) for one in own]
            found = measure_answers(reference, artifact, written, progress)
            fidelity = replace(fidelity, answers=found)
    if fidelity is not None:
        checks += fidelity_checks(fidelity, thresholds)
    checks += answering
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
    answer_tokens: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Open the file or folder `artifact` and `verify` it; if it does not open, the check ``opens`` fails.

    Without `thresholds`, those of the quantization type in the file's metadata are used, the strictest without one;
    without `answer_tokens` the budget in the ``student.json`` beside the file.

    Raises FileNotFoundError: no such file or folder; ArteError: as `verify`, or its runtime is not installed.
    """
    if not artifact.exists():
        raise FileNotFoundError(artifact)
    try:
        model = open_model(artifact, threads)
    except InputError as error:
        note = error.message.replace(str(artifact), artifact.name)
        return Verdict(False, (Check("opens", None, None, False, note),), None, None, reference.name, artifact.name)
    try:
        type = ""
        if thresholds is None:
            type = _type_of(model, artifact)
            thresholds = thresholds_for(type)
        verdict = verify(
            reference,
            model,
            prompts,
            thresholds,
            task=task,
            limit=limit,
            final=final,
            answer_tokens=answer_tokens or noted_tokens(artifact),
            progress=progress,
        )
        return replace(verdict, thresholds_of=type)
    finally:
        model.close()


def _type_of(model: Runtime, artifact: Path) -> str:
    """Return the type whose thresholds count: int8 of optimum's layout has its own, as in a recipe."""
    type = model.quantization
    if type == "int8" and not (artifact / GENAI).is_file():
        type = "optimum-int8"
    return type if type in TYPES else STRICTEST

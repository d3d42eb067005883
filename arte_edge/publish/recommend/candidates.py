"""The metrics of each file on one device: measured where possible, else predicted and marked so.

Measurements are those that `arte-edge bench` merged into ``student.json`` and the raw rows of
``bench.jsonl`` (`arte_edge.results.merge`).

A file is on the Pareto front of accuracy, speed and size unless another dominates it: is at least as good in all three
and better in one. Files are compared only on known axes: where no accuracy was measured, the front is that of speed
and size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from arte_edge.device.roofline import Predictor
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.merge import belongs_to, evaluation_of, measured
from arte_edge.results.rows import QualityRow, Row
from arte_edge.results.student_json import Artifact, Evaluation, StudentFile

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
    def change(self) -> PairedAccuracy | None:
        """The accuracy with a difference from the 16-bit student: the gate's where no device had a 16-bit file."""
        known = (one for one in (self.accuracy, self.artifact.accuracy) if one and one.difference is not None)
        return next(known, None)

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
    axes = [axis for axis in _AXES if axis == "size" or any(found[axis] is not None for found in values.values())]
    known = {file: tuple(v for axis in axes if (v := found[axis]) is not None) for file, found in values.items()}
    points = {file: point for file, point in known.items() if len(point) == len(axes)}
    speed = {c.file: c.speed for c in candidates}
    front = (file for file, p in points.items() if not any(_dominates(other, p) for other in points.values()))
    on = sorted(front, key=lambda file: (-speed[file], file))
    return ParetoFront(tuple(on), tuple(axes), tuple(file for file in values if file not in points))


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)


@dataclass(frozen=True)
class Constraints:
    """The limits; None: no limit. Each is checked on its own, and one that cannot be checked is not satisfied."""

    max_ram_bytes: int | None = None  # peak resident memory of the process that runs the file
    min_decode: float | None = None  # tokens per second
    max_drop: float | None = None  # points of accuracy below the 16-bit student
    max_size_bytes: int | None = None
    max_answer_seconds: float | None = None
    prompt_tokens: int = 256  # of one prompt, for an answer time that was not measured
    answer_tokens: int = 64

    @property
    def any(self) -> bool:
        """Whether there is any limit."""
        limits = (self.max_ram_bytes, self.min_decode, self.max_drop, self.max_size_bytes)
        return any(limit is not None for limit in (*limits, self.max_answer_seconds))


def candidates(
    student: StudentFile,
    names: frozenset[str],
    constraints: Constraints,
    rows: Sequence[Row] = (),
    predict: Predictor | None = None,
) -> list[Candidate]:
    """Return what is known of every artifact on the device that goes by one of `names`."""
    rates = _accuracies(student, rows)
    found = []
    for artifact in student.artifacts:
        best, notes = measured(artifact, names, rows)
        decode = ram = prefill = None
        if best is not None:
            decode, ram, prefill = (
                _metric(value, "measured", best.source) for value in (best.decode, best.ram_bytes, best.prefill)
            )
        if predict and (decode is None or ram is None) and (guess := predict(artifact)) is not None:
            decode = decode or _metric(guess.decode_tokens_per_s, "predicted", guess.source)
            ram = ram or _metric(guess.ram_bytes, "predicted", guess.source)
            prefill = prefill or _metric(guess.prefill_tokens_per_s, "predicted", guess.prefill_source)
        answer_s = _answer_s(artifact, names, rows) or _computed_answer_s(decode, prefill, constraints)
        accuracy = rates.get(artifact.file)
        found.append(Candidate(artifact, accuracy, decode, prefill, ram, answer_s, notes))
    return found


def _accuracies(student: StudentFile, rows: Sequence[Row] = ()) -> dict[str, PairedAccuracy]:
    """Return the accuracy of each file: on the test split where every file has that, else the gate's.

    Files are only compared on the same examples, so one file's test split is not compared with another's
    validation split.
    """
    own = {a.file: a.accuracy for a in student.artifacts if a.accuracy is not None}
    tested: dict[str, Evaluation] = {}
    for artifact in student.artifacts:
        whole = [e for e in _evaluations(artifact, rows) if e.split == "test" and not e.partial]
        if whole:
            tested[artifact.file] = max(whole, key=lambda e: (e.n, e.difference is not None, e.test_time))
    needed = {a.file for a in student.artifacts if a.status == "ok" and (a.accuracy or a.file in tested)}
    same = len({(found.task, found.n) for found in tested.values()}) == 1
    return {**tested} if same and needed <= set(tested) else own


def _evaluations(artifact: Artifact, rows: Sequence[Row]) -> list[Evaluation]:
    """Return the accuracies of a file on devices: merged entries, and rows that are not merged yet."""
    new = [
        evaluation_of(row)
        for row in rows
        if isinstance(row, QualityRow) and row.status == "ok" and row.n > 0 and belongs_to(row, artifact)
    ]
    return [*artifact.evaluations, *new]


def _metric(value: float | None, evidence: Evidence, source: str) -> Metric | None:
    return Metric(float(value), evidence, source) if value else None


def _answer_s(artifact: Artifact, names: frozenset[str], rows: Sequence[Row]) -> Metric | None:
    """Return the 95th percentile of the answer times on the device, of the evaluation with the most examples."""
    found = [
        (e.n, e.answer_seconds_p95)
        for e in _evaluations(artifact, rows)
        if e.answer_seconds_p95 is not None and not e.contended and names & {e.device, e.fingerprint} - {""}
    ]
    if not found:
        return None
    n, seconds = max(found)
    return Metric(seconds, "measured", f"95 % of {n} answers")


def _computed_answer_s(decode: Metric | None, prefill: Metric | None, constraints: Constraints) -> Metric | None:
    """Return the time of an answer of the length in `constraints`, computed from the rates: a prediction."""
    if decode is None or prefill is None:
        return None
    seconds = constraints.prompt_tokens / prefill.value + constraints.answer_tokens / decode.value
    lengths = f"{constraints.prompt_tokens} prompt and {constraints.answer_tokens} answer tokens"
    return Metric(seconds, "predicted", f"{lengths} at {decode.evidence} rates")

"""The metrics of each file on one device: measured where possible, else predicted and marked so.

Measurements are those that `arte-edge bench` merged into ``student.json`` and the raw rows of
``bench.jsonl`` (`arte_edge.results.measurements`).
"""

from __future__ import annotations

from collections.abc import Sequence

from arte_edge.device.roofline import Predictor
from arte_edge.publish.recommend.constraints import Constraints
from arte_edge.publish.recommend.pareto import Candidate, Metric
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.measurements import measured
from arte_edge.results.merge import belongs_to, evaluation_of
from arte_edge.results.rows import QualityRow, Row
from arte_edge.results.student_json import Artifact, Evaluation, StudentFile

__all__ = ["accuracies", "candidates", "evaluations"]


def candidates(
    student: StudentFile,
    names: frozenset[str],
    constraints: Constraints,
    rows: Sequence[Row] = (),
    predict: Predictor | None = None,
) -> list[Candidate]:
    """Return what is known of every artifact on the device that goes by one of `names`."""
    rates = accuracies(student, rows)
    return [
        _candidate(artifact, names, constraints, rows, predict, rates.get(artifact.file))
        for artifact in student.artifacts
    ]


def accuracies(student: StudentFile, rows: Sequence[Row] = ()) -> dict[str, PairedAccuracy]:
    """Return the accuracy of each file: on the test split where every file has that, else the gate's.

    Files are only compared on the same examples, so one file's test split is not compared with another's
    validation split.
    """
    own = {a.file: a.accuracy for a in student.artifacts if a.accuracy is not None}
    tested: dict[str, Evaluation] = {}
    for artifact in student.artifacts:
        whole = [e for e in evaluations(artifact, rows) if e.split == "test" and not e.partial]
        if whole:
            tested[artifact.file] = max(whole, key=lambda e: (e.n, e.difference is not None, e.test_time))
    needed = {a.file for a in student.artifacts if a.status == "ok" and (a.accuracy or a.file in tested)}
    same = len({(found.task, found.n) for found in tested.values()}) == 1
    return {**tested} if same and needed <= set(tested) else own


def evaluations(artifact: Artifact, rows: Sequence[Row] = ()) -> list[Evaluation]:
    """Return what was measured of a file's answers on devices: merged entries, and rows not merged yet."""
    found = list(artifact.evaluations)
    for row in rows:
        if isinstance(row, QualityRow) and row.status == "ok" and row.n > 0 and belongs_to(row, artifact):
            found.append(evaluation_of(row))
    return found


def _candidate(
    artifact: Artifact,
    names: frozenset[str],
    constraints: Constraints,
    rows: Sequence[Row],
    predict: Predictor | None,
    accuracy: PairedAccuracy | None,
) -> Candidate:
    best, throttled = measured(artifact, names, rows)
    guess = predict(artifact) if predict and (best is None or None in (best.decode, best.ram_bytes)) else None
    source = best.source if best else ""
    decode = _measured(best.decode if best else None, source)
    ram = _measured(best.ram_bytes if best else None, source)
    prefill = _measured(best.prefill if best else None, source)
    if guess is not None:
        decode = decode or _predicted(guess.decode_tokens_per_s, guess.source)
        ram = ram or _predicted(guess.ram_bytes, guess.source)
        prefill = prefill or _predicted(guess.prefill_tokens_per_s, guess.prefill_source)
    notes = (f"{throttled} throttled measurement(s) left out",) if throttled else ()
    answer_s = _answer_s(artifact, names, rows) or _computed_answer_s(decode, prefill, constraints)
    return Candidate(artifact, accuracy, decode, prefill, ram, answer_s, notes)


def _measured(value: float | None, source: str) -> Metric | None:
    return Metric(float(value), "measured", source) if value else None


def _predicted(value: float | None, source: str) -> Metric | None:
    return Metric(float(value), "predicted", source) if value else None


def _answer_s(artifact: Artifact, names: frozenset[str], rows: Sequence[Row]) -> Metric | None:
    """Return the time that 19 of 20 answers took on the device, of the most examples."""
    found = [
        (e.n, e.answer_seconds_p95)
        for e in evaluations(artifact, rows)
        if e.answer_seconds_p95 is not None and names & ({e.device, e.fingerprint} - {""})
    ]
    if not found:
        return None
    n, seconds = max(found)
    return Metric(seconds, "measured", f"95 % of {n} answers")


def _computed_answer_s(
    decode: Metric | None, prefill: Metric | None, constraints: Constraints
) -> Metric | None:
    """Return the time of an answer of the length in `constraints`, computed from the rates: a prediction."""
    if decode is None or prefill is None:
        return None
    seconds = constraints.prompt_tokens / prefill.value + constraints.answer_tokens / decode.value
    lengths = f"{constraints.prompt_tokens} prompt and {constraints.answer_tokens} answer tokens"
    return Metric(seconds, "predicted", f"{lengths} at {decode.evidence} rates")

"""Merge measured rows into ``student.json``, so that measurements travel with the files, and find a file's speed.

A row belongs to the file with its tensor hash, even after the file's metadata was rewritten.
One test of one file is identified by device, runtime, threads and shape. Of two results for the same
test a valid one wins over a throttled or contended one, that over a failure, and among equals the
newer: a rerun replaces its own entry and no other, and merging is idempotent and independent of the
order of the rows. The rows themselves stay in ``bench.jsonl``.

The speed of a file on a device is read from both documents, merged in the same way (`measured`). Measurements of a
throttled device, beside other work, or under an emulator are left out. Of several of a file (threads, runtimes) the
one with the highest decode rate counts, with its own prefill rate and memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.cache import locked
from arte_edge.errors import InputError
from arte_edge.results.accuracy import Record
from arte_edge.results.rows import QualityRow, Row, SpeedRow, disturbance, left_out_notes
from arte_edge.results.student_json import (
    FILE_NAME,
    Artifact,
    Evaluation,
    Speed,
    SpeedTest,
    StudentFile,
    read_student,
    write_student,
)

_Key = tuple[str, str, int, int]  # fingerprint, runtime, threads, depth


@dataclass(frozen=True)
class Merged:
    """The document with the rows merged in, and a note for each kind of row that was skipped and why."""

    student: StudentFile
    notes: tuple[str, ...] = ()


def merge_rows(folder: Path, rows: Sequence[Row], *, note: Callable[[str], None] | None = None) -> StudentFile:
    """Merge `rows` into ``student.json`` of `folder`, all of them or none; return the document.

    Args:
        note: called with a sentence for what was skipped.

    Raises:
        InputError: there is no ``student.json``, or it is damaged; it is left as it is.
        ArteError: the disk is full.
    """
    with student_lock(folder):
        try:
            student = read_student(folder)
        except InputError as error:
            raise InputError(
                error.message, "Nothing is lost: the rows are in bench.jsonl. Export again, then: arte-edge card DIR."
            ) from error
        if student is None:
            raise InputError(f"{folder}: no {FILE_NAME} here", "Make files first: arte-edge export RUN.")
        merged = merge_into(student, rows)
        if merged.student != student:
            write_student(folder, merged.student)
    if note:
        for text in merged.notes:
            note(text)
    return merged.student


def student_lock(folder: Path) -> AbstractContextManager[None]:
    """Return a lock on ``student.json`` of `folder`, for whoever reads it, changes it and writes it."""
    return locked("student", of=folder)


def merge_into(student: StudentFile, rows: Iterable[Row]) -> Merged:
    """Return `student` with `rows` merged into its files."""
    notes: dict[str, None] = {}
    mine: dict[int, list[Row]] = defaultdict(list)
    own: list[QualityRow] = []
    for row in rows:
        places = [i for i, artifact in enumerate(student.artifacts) if belongs_to(row, artifact)]
        if reason := _not_mergeable(row):
            notes[reason] = None
        elif places:
            for place in places:
                mine[place].append(row)
        elif isinstance(row, QualityRow) and row.sha256 == student.student.sha256:
            own.append(row)
        elif row.format == "safetensors" and row.sha256 == student.student.sha256:
            notes[f"{row.model_filename}: the 16-bit student's own speed stays in bench.jsonl"] = None
        else:
            notes[f"{row.model_filename}: no file in {FILE_NAME} has these tensors; not merged"] = None
    artifacts = tuple(_with(artifact, mine.get(i, [])) for i, artifact in enumerate(student.artifacts))
    changed = student.model_copy(
        update={"artifacts": artifacts, "student_evaluations": _evaluations(student.student_evaluations, own)}
    )
    return Merged(changed, tuple(notes))


def belongs_to(row: Row, artifact: Artifact) -> bool:
    """Return whether `row` was measured on the tensors of `artifact`."""
    if row.tensor_sha256:
        return row.tensor_sha256 == artifact.tensor_sha256
    return bool(row.sha256) and row.sha256 == artifact.sha256


def _not_mergeable(row: Row) -> str:
    """Return why a row is not merged; empty if it is."""
    if row.format == "null":
        return f"{row.model_filename}: the null runtime, which times only the harness; not merged"
    if isinstance(row, SpeedRow) and "qemu" in row.device.virtual:
        return f"{row.model_filename}: run under an emulator, which has no device's speed; not merged"
    if isinstance(row, QualityRow) and (row.status != "ok" or row.n == 0):
        return f"{row.model_filename}: {row.task} was not measured ({row.reason or row.status}); not merged"
    if isinstance(row, QualityRow) and row.right > row.n:
        return f"{row.model_filename}: a damaged row, {row.right} correct of {row.n}; not merged"
    return ""


def _with(artifact: Artifact, rows: Sequence[Row]) -> Artifact:
    if not rows:
        return artifact
    speeds = _speeds(artifact.speeds, [row for row in rows if isinstance(row, SpeedRow)])
    found = _evaluations(artifact.evaluations, [row for row in rows if isinstance(row, QualityRow)])
    return artifact.model_copy(update={"speeds": speeds, "evaluations": found})


def _speeds(there: Sequence[Speed], rows: Sequence[SpeedRow]) -> tuple[Speed, ...]:
    others = tuple(speed for speed in there if not speed.tests)  # not from rows: unchanged
    tests: dict[_Key, list[SpeedTest]] = defaultdict(list)
    facts: dict[_Key, set[tuple[str, str]]] = defaultdict(set)
    for speed in there:
        key = (speed.fingerprint, speed.runtime, speed.threads, speed.n_depth)
        if speed.tests:
            tests[key] += speed.tests
            facts[key].add((speed.profile, speed.cpu))
    for row in rows:
        key = (row.device.fingerprint, row.runtime, row.n_threads, row.n_depth)
        tests[key].append(_test(row))
        facts[key].add((row.device.profile, row.device.cpu))
    made = (_speed(key, max(facts[key]), _newest(tests[key])) for key in sorted(tests))
    return (*others, *made)


def _newest(tests: Iterable[SpeedTest]) -> tuple[SpeedTest, ...]:
    """Return one result a test, sorted by name."""
    best: dict[str, SpeedTest] = {}
    for test in tests:
        best[test.test] = max(best.get(test.test, test), test, key=_rank)
    return tuple(best[name] for name in sorted(best))


def _rank(test: SpeedTest) -> tuple[int, str, str]:
    return _validity(test), test.test_time, test.model_dump_json()


def _validity(test: SpeedTest) -> int:
    return 0 if test.status != "ok" else 1 if disturbance(test) else 2


def _speed(key: _Key, facts: tuple[str, str], tests: tuple[SpeedTest, ...]) -> Speed:
    """Return the entry whose summary metrics are taken from `tests`.

    They come from the tests nearest to llama-bench's defaults (prefill of 512 tokens, generation of
    128) among the valid ones, or among the throttled and contended if there is no other. A pg test,
    which does both, gives neither rate.
    """
    fingerprint, runtime, threads, n_depth = key
    profile, cpu = facts
    level = max(_validity(test) for test in tests)
    usable = [test for test in tests if _validity(test) == level and level > 0]
    reads = [test for test in usable if test.n_prompt and not test.n_gen]
    writes = [test for test in usable if test.n_gen and not test.n_prompt]
    prefill = min(reads, key=lambda test: (abs(test.n_prompt - 512), test.n_prompt), default=None)
    decode = min(writes, key=lambda test: (abs(test.n_gen - 128), test.n_gen), default=None)
    taken = [test for test in (prefill, decode) if test is not None]
    throttled, contended = (
        [flag for test in taken if (flag := getattr(test, name)) is not None] for name in ("throttled", "contended")
    )
    memory = [test.peak_rss_bytes for test in taken if test.peak_rss_bytes is not None]
    warmth = [test.temperature_c_max for test in taken if test.temperature_c_max is not None]
    return Speed(
        device=profile or fingerprint,
        fingerprint=fingerprint,
        profile=profile,
        cpu=cpu,
        runtime=runtime,
        threads=threads,
        n_depth=n_depth,
        ttft_ms=prefill.ttft_ms if prefill else None,
        prefill_tokens_per_s=prefill.tokens_per_s if prefill else None,
        decode_tokens_per_s=decode.tokens_per_s if decode else None,
        itl_p50_ms=decode.itl_p50_ms if decode else None,
        itl_p95_ms=decode.itl_p95_ms if decode else None,
        peak_rss_bytes=max(memory, default=None),
        temperature_c_max=max(warmth, default=None),
        throttled=any(throttled) if throttled else None,
        contended=any(contended) if contended else None,
        energy_j=decode.energy_j if decode else None,
        tests=tests,
    )


def _test(row: SpeedRow) -> SpeedTest:
    rate = (row.median_ts or row.avg_ts) if row.ok else 0.0
    return SpeedTest(
        **_shared(row, SpeedTest),
        n_samples=len(row.samples_ts),
        tokens_per_s=rate or None,
        cv_ratio=row.cv if rate else None,
        sustained_tokens_per_s=row.sustained_ts,
    )


def _shared(row: Row, kind: type[Record]) -> dict[str, Any]:
    """Return the keys that a row and a part of ``student.json`` have in common."""
    return row.model_dump(include={*type(row).model_fields} & {*kind.model_fields} - {"device"})


def _evaluations(there: Sequence[Evaluation], rows: Sequence[QualityRow]) -> tuple[Evaluation, ...]:
    best: dict[tuple[str, ...], Evaluation] = {}
    for found in (*there, *(evaluation_of(row) for row in rows)):
        key = (found.task, found.task_sha256, found.split, found.fingerprint, found.runtime)
        best[key] = max(best.get(key, found), found, key=_priority)
    return tuple(best[key] for key in sorted(best))


def _priority(found: Evaluation) -> tuple[bool, int, bool, str, str]:
    """A whole split wins over a part, a larger part over a smaller one, valid times over contended, then the newer."""
    size = found.n if found.partial else 0
    return not found.partial, size, not found.contended, found.test_time, found.model_dump_json()


def evaluation_of(row: QualityRow) -> Evaluation:
    """Return a row of a task as an entry of ``student.json``."""
    device = row.device
    return Evaluation(
        **_shared(row, Evaluation),
        device=device.profile or device.fingerprint,
        fingerprint=device.fingerprint,
        threads=row.n_threads,
    )


@dataclass(frozen=True)
class Measured:
    """One measurement of one file: rates in tokens/s, memory in bytes, and what ran it."""

    decode: float | None
    prefill: float | None
    ram_bytes: int | None
    source: str


Found = tuple[Measured | None, tuple[str, ...]]


def measured(artifact: Artifact, names: frozenset[str], rows: Sequence[Row] = ()) -> Found:
    """Return the measurement that counts, None if there is none; and a sentence for those that were left out."""
    mine = [row for row in _speed_rows(rows, names) if belongs_to(row, artifact)]
    return _best([speed for speed in _speeds(artifact.speeds, mine) if names & speed.names])


def best_of_rows(rows: Sequence[Row], file: str, names: frozenset[str]) -> Found:
    """Return the same of a file by its name or quantization type, where its hash is unknown."""
    mine = [row for row in _speed_rows(rows, names) if file in (row.quantization, row.model_filename)]
    return _best(_speeds((), mine))


def _best(speeds: Sequence[Speed]) -> Found:
    """Return the fastest that nothing disturbed; a disturbed test that was measured again is not among `speeds`."""
    valid = [speed for speed in speeds if not disturbance(speed)]
    best = max(valid, key=lambda speed: speed.decode_tokens_per_s or 0.0, default=None)
    left_out = left_out_notes(kind for speed in speeds for kind in speed.disturbances)
    if best is None:
        return None, left_out
    source = f"{best.runtime}, {best.threads} thread{'s' * (best.threads != 1)}"
    return Measured(best.decode_tokens_per_s, best.prefill_tokens_per_s, best.peak_rss_bytes, source), left_out


def _speed_rows(rows: Sequence[Row], names: frozenset[str]) -> list[SpeedRow]:
    """Return the valid tests on the device, none under an emulator."""
    tests = (row for row in rows if isinstance(row, SpeedRow) and row.ok)
    return [row for row in tests if "qemu" not in row.device.virtual and names & row.device.names]

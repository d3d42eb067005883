"""Merge measured rows into ``student.json``, so that what a device said travels with the files.

A row belongs to the file with its tensor hash, whatever was written into the file's metadata since.
One test of one file is known by device, runtime, threads and shape. Of two results for the same
test a sound one stands before one of a throttled device, that before a failure, and among equals the
newer: a rerun replaces its own entry and no other, and rows give the same document in whatever order
and however often they are merged. The rows themselves stay in ``bench.jsonl``.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from arte_edge.bench.result import QualityRow, SpeedRow
from arte_edge.cache import locked
from arte_edge.errors import InputError
from arte_edge.export.student import (
    FILE_NAME,
    Artifact,
    Evaluation,
    Speed,
    SpeedTest,
    StudentFile,
    read_student,
    write_student,
)

__all__ = ["Merged", "Row", "merge_into", "merge_rows", "speed_of", "student_lock"]

Row = SpeedRow | QualityRow
_Key = tuple[str, str, int, int]  # fingerprint, runtime, threads, depth


@dataclass(frozen=True)
class Merged:
    """The document with the rows in it, and in words what was not taken and why."""

    student: StudentFile
    notes: tuple[str, ...] = ()


def merge_rows(
    folder: Path, rows: Sequence[Row], *, note: Callable[[str], None] | None = None
) -> StudentFile:
    """Merge `rows` into ``student.json`` of `folder`, all of them or none; return the document.

    Args:
        note: is told what was not taken, in words.

    Raises:
        InputError: there is no ``student.json``, or it is damaged; it is left as it is.
        ArteError: the disk is full.
    """
    with student_lock(folder):
        try:
            student = read_student(folder)
        except InputError as error:
            raise InputError(
                error.message,
                "Nothing is lost: the rows are in bench.jsonl. Export again, then: arte-edge card DIR.",
            ) from error
        if student is None:
            raise InputError(f"{folder}: no {FILE_NAME} here", "Make files first: arte-edge export RUN.")
        merged = merge_into(student, rows)
        if merged.student != student:
            write_student(folder, merged.student)
    for text in merged.notes if note else ():
        assert note is not None
        note(text)
    return merged.student


def student_lock(folder: Path) -> AbstractContextManager[None]:
    """Return a lock on ``student.json`` of `folder`, for whoever reads it, changes it and writes it."""
    return locked(f"student-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}")


def merge_into(student: StudentFile, rows: Iterable[Row]) -> Merged:
    """Return `student` with `rows` merged into its files."""
    notes: dict[str, None] = {}
    mine: dict[int, list[Row]] = defaultdict(list)
    own: list[QualityRow] = []
    for row in rows:
        places = [i for i, artifact in enumerate(student.artifacts) if _is(artifact, row)]
        if refusal := _refusal(row):
            notes[refusal] = None
        elif places:
            for place in places:
                mine[place].append(row)
        elif isinstance(row, QualityRow) and row.sha256 == student.student.sha256:
            own.append(row)
        elif row.format == "safetensors" and row.sha256 == student.student.sha256:
            notes[f"{row.model_filename}: the 16-bit student's own speed stays in bench.jsonl"] = None
        else:
            notes[f"{row.model_filename}: no file in {FILE_NAME} has its tensors; not merged"] = None
    artifacts = tuple(_with(artifact, mine.get(i, [])) for i, artifact in enumerate(student.artifacts))
    changed = student.model_copy(
        update={
            "artifacts": artifacts,
            "student_evaluations": _evaluations(student.student_evaluations, own),
        }
    )
    return Merged(changed, tuple(notes))


def _is(artifact: Artifact, row: Row) -> bool:
    if row.tensor_sha256:
        return row.tensor_sha256 == artifact.tensor_sha256
    return bool(row.sha256) and row.sha256 == artifact.sha256


def _refusal(row: Row) -> str:
    """Return why a row says nothing about a file on a device; empty if it does."""
    if row.format == "null":
        return f"{row.model_filename}: an empty runtime, which times only the harness; not merged"
    if isinstance(row, SpeedRow) and "qemu" in row.device.virtual:
        return f"{row.model_filename}: run under an emulator, whose speed is no device's; not merged"
    if isinstance(row, QualityRow) and (row.status != "ok" or row.n == 0):
        return f"{row.model_filename}: {row.task} was not measured ({row.reason or row.status}); not merged"
    if isinstance(row, QualityRow) and row.right > row.n:
        return f"{row.model_filename}: a damaged row says {row.right} right of {row.n}; not merged"
    return ""


def _with(artifact: Artifact, rows: Sequence[Row]) -> Artifact:
    if not rows:
        return artifact
    speeds = _speeds(artifact.speeds, [row for row in rows if isinstance(row, SpeedRow)])
    quality = [row for row in rows if isinstance(row, QualityRow)]
    return artifact.model_copy(
        update={"speeds": speeds, "evaluations": _evaluations(artifact.evaluations, quality)}
    )


def _speeds(there: Sequence[Speed], rows: Sequence[SpeedRow]) -> tuple[Speed, ...]:
    foreign = tuple(speed for speed in there if not speed.tests)  # not from rows: left alone
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
    made = (speed_of(key, max(facts[key]), _newest(tests[key])) for key in sorted(tests))
    return (*foreign, *made)


def _newest(tests: Iterable[SpeedTest]) -> tuple[SpeedTest, ...]:
    """Return one result a test, sorted by name."""
    best: dict[str, SpeedTest] = {}
    for test in tests:
        there = best.get(test.test)
        best[test.test] = test if there is None else max(there, test, key=_rank)
    return tuple(best[name] for name in sorted(best))


def _rank(test: SpeedTest) -> tuple[int, str, str]:
    return _soundness(test), test.test_time, test.model_dump_json()


def _soundness(test: SpeedTest) -> int:
    return 0 if test.status != "ok" else 1 if test.throttled else 2


def speed_of(key: _Key, facts: tuple[str, str], tests: tuple[SpeedTest, ...]) -> Speed:
    """Return the entry whose figures are taken from `tests`.

    They come from the tests nearest to llama-bench's own (512 tokens read, 128 written) among the
    sound ones, or among those of the throttled device if there is no other. A pg test, which reads
    and writes, gives neither rate.
    """
    fingerprint, runtime, threads, n_depth = key
    profile, cpu = facts
    level = max(_soundness(test) for test in tests)
    usable = [test for test in tests if _soundness(test) == level and level > 0]
    reads = [test for test in usable if test.n_prompt and not test.n_gen]
    writes = [test for test in usable if test.n_gen and not test.n_prompt]
    prefill = min(reads, key=lambda test: (abs(test.n_prompt - 512), test.n_prompt), default=None)
    decode = min(writes, key=lambda test: (abs(test.n_gen - 128), test.n_gen), default=None)
    taken = [test for test in (prefill, decode) if test is not None]
    told = [test.throttled for test in taken if test.throttled is not None]
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
        peak_rss_bytes=max((t.peak_rss_bytes for t in taken if t.peak_rss_bytes is not None), default=None),
        temperature_c_max=max(
            (t.temperature_c_max for t in taken if t.temperature_c_max is not None), default=None
        ),
        throttled=any(told) if told else None,
        energy_j=decode.energy_j if decode else None,
        tests=tests,
    )


def _test(row: SpeedRow) -> SpeedTest:
    rate = (row.median_ts or row.avg_ts) if row.ok else 0.0
    return SpeedTest(
        test=row.test,
        n_prompt=row.n_prompt,
        n_gen=row.n_gen,
        status=row.status,
        reason=row.reason,
        test_time=row.test_time,
        n_samples=len(row.samples_ts),
        tokens_per_s=rate or None,
        cv_ratio=row.cv if rate else None,
        sustained_tokens_per_s=row.sustained_ts,
        load_ms=row.load_ms,
        ttft_ms=row.ttft_ms,
        itl_p50_ms=row.itl_p50_ms,
        itl_p95_ms=row.itl_p95_ms,
        peak_rss_bytes=row.peak_rss_bytes,
        temperature_c_max=row.temperature_c_max,
        throttled=row.throttled,
        energy_j=row.energy_j,
        energy_source=row.energy_source,
    )


def _evaluations(there: Sequence[Evaluation], rows: Sequence[QualityRow]) -> tuple[Evaluation, ...]:
    best: dict[tuple[str, ...], Evaluation] = {}
    for found in (*there, *(_evaluation(row) for row in rows)):
        key = (found.task, found.task_sha256, found.split, found.fingerprint, found.runtime)
        before = best.get(key)
        best[key] = found if before is None else max(before, found, key=_worth)
    return tuple(best[key] for key in sorted(best))


def _worth(found: Evaluation) -> tuple[bool, int, str, str]:
    """All of a split stands before a part of it, a larger part before a smaller one, then the newer."""
    size = found.n if found.partial else 0
    return not found.partial, size, found.test_time, found.model_dump_json()


def _evaluation(row: QualityRow) -> Evaluation:
    return Evaluation(
        task=row.task,
        split=row.split,
        n=row.n,
        right=row.right,
        accuracy=row.right / row.n,
        low=row.low,
        high=row.high,
        difference=row.difference,
        difference_low=row.difference_low,
        difference_high=row.difference_high,
        p_value=row.p_value,
        device=row.device.profile or row.device.fingerprint,
        fingerprint=row.device.fingerprint,
        runtime=row.runtime,
        threads=row.n_threads,
        partial=row.partial,
        task_sha256=row.task_sha256,
        reference=row.reference,
        reference_right=row.reference_right,
        answer_seconds_p50=row.answer_seconds_p50,
        answer_seconds_p95=row.answer_seconds_p95,
        test_time=row.test_time,
    )

"""Measured results in a GGUF file's own metadata: ``arte_edge.bench.*`` and ``arte_edge.fidelity.*``.

Few scalars, one group a device: a loader prints all of them. Only publishable results are written (see
`publishable`), so no throttled rate and no accuracy on a part of a split. The keys of an earlier run are
replaced as a whole. Tensors are not touched, hence results stay with the file; its own sum
in ``student.json`` follows.

    arte_edge.bench.count                       uint32
    arte_edge.bench.{i}.device, .runtime, .date string
    arte_edge.bench.{i}.threads                 uint32
    arte_edge.bench.{i}.prefill_tps, .decode_tps, .ttft_ms   float32
    arte_edge.bench.{i}.peak_rss_bytes          uint64
    arte_edge.bench.{i}.throttled               bool; missing where the device does not report it
    arte_edge.bench.{i}.task, .split            string, with .accuracy float32 and .accuracy_n uint32
    arte_edge.fidelity.kl_mean, .top1_agreement, .ppl_ratio  float32, against the 16-bit student
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from arte_edge.errors import InputError
from arte_edge.gguf.metadata import rewrite
from arte_edge.gguf.reader import Field
from arte_edge.gguf.types import BOOL, FLOAT32, STRING, UINT32, UINT64
from arte_edge.models.artifact_hash import checksums_of
from arte_edge.publish.publishable import accuracy_on, device_title, speeds
from arte_edge.results.locate import read_export
from arte_edge.results.merge import student_lock
from arte_edge.results.student_json import Artifact, write_student

__all__ = ["BENCH", "FIDELITY", "bench_fields", "fidelity_fields", "write_keys"]

BENCH, FIDELITY = "arte_edge.bench.", "arte_edge.fidelity."


def bench_fields(artifact: Artifact, *, allow_throttled: bool = False) -> dict[str, Field]:
    """Return the keys of a file's measured speeds; none if nothing was measured."""
    found = speeds(artifact, allow_throttled)
    if not found:
        return {}
    fields = {f"{BENCH}count": Field(UINT32, len(found))}
    for i, speed in enumerate(found):
        quality = accuracy_on(artifact, speed.fingerprint) if speed.fingerprint else None
        values: dict[str, tuple[int, str | float | None]] = {
            "device": (STRING, device_title(speed)),
            "runtime": (STRING, speed.runtime),
            "threads": (UINT32, speed.threads),
            "depth": (UINT32, speed.n_depth or None),
            "prefill_tps": (FLOAT32, speed.prefill_tokens_per_s),
            "decode_tps": (FLOAT32, speed.decode_tokens_per_s),
            "ttft_ms": (FLOAT32, speed.ttft_ms),
            "peak_rss_bytes": (UINT64, speed.peak_rss_bytes),
            "throttled": (BOOL, speed.throttled),
            "date": (STRING, speed.date or None),
            "task": (STRING, quality.task if quality else None),
            "split": (STRING, quality.split if quality else None),
            "accuracy": (FLOAT32, quality.accuracy if quality else None),
            "accuracy_n": (UINT32, quality.n if quality else None),
        }
        for name, (kind, value) in values.items():
            if value is not None:
                fields[f"{BENCH}{i}.{name}"] = Field(
                    kind, value.encode() if isinstance(value, str) else value
                )
    return fields


def fidelity_fields(artifact: Artifact) -> dict[str, Field]:
    """Return the keys of the file's fidelity to the 16-bit student."""
    if (metrics := artifact.fidelity.metrics) is None:
        return {}
    found = {
        "kl_mean": metrics.kl_mean,
        "top1_agreement": metrics.top1,
        "ppl_ratio": metrics.perplexity_ratio,
    }
    return {f"{FIDELITY}{name}": Field(FLOAT32, v) for name, v in found.items() if v is not None}


def write_keys(
    folder: Path, *, allow_throttled: bool = False, note: Callable[[str], None] | None = None
) -> tuple[str, ...]:
    """Write what is known of every accepted GGUF into it; return the files that changed.

    Their new sums go into ``student.json``. A kill in between leaves an old sum there, which the next
    run corrects, since the tensors identify the file.

    Raises:
        InputError: a file holds other tensors than ``student.json`` says, and is not touched; or there
            is no readable ``student.json``.
        ArteError: no room for a second copy of a file, or the disk refuses.
    """
    changed: list[str] = []
    with student_lock(folder):
        student = read_export(folder)
        artifacts = list(student.artifacts)
        for i, artifact in enumerate(artifacts):
            if artifact.format != "gguf" or artifact.status != "ok":
                continue
            if not (folder / artifact.file).is_file():
                if note:
                    note(f"{artifact.file} is not here; its keys were not written")
                continue
            artifacts[i], is_new = _write_one(folder / artifact.file, artifact, allow_throttled)
            if is_new:
                changed.append(artifact.file)
            if artifacts[i] != artifact:
                write_student(folder, student.model_copy(update={"artifacts": tuple(artifacts)}))
    return tuple(changed)


def _write_one(path: Path, artifact: Artifact, allow_throttled: bool) -> tuple[Artifact, bool]:
    """Rewrite one file; return its entry with the sums that it now has, and whether the file changed."""
    sums = checksums_of(path)
    if sums.tensor_sha256 != artifact.tensor_sha256:
        raise InputError(
            f"{artifact.file}: its tensors are not those that student.json describes",
            "Export it again; results of another file are not written into it.",
        )
    fields = bench_fields(artifact, allow_throttled=allow_throttled) | fidelity_fields(artifact)
    done = rewrite(path, fields, drop=(BENCH, FIDELITY))
    update = {"sha256": done.sha256 or sums.sha256, "size_bytes": path.stat().st_size}
    return artifact.model_copy(update=update), done.changed

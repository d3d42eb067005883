"""Measured results in a GGUF file's own metadata: ``arte_edge.bench.*`` and ``arte_edge.fidelity.*``.

One group of scalars a device; few, because loaders print all keys. Only publishable results are written (see
`publishable`), so no throttled rate and no accuracy on a part of a split. The keys of an earlier run are
replaced as a whole. Tensors do not change, so results still belong to the file; its checksum in
``student.json`` is updated.

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
from arte_edge.gguf.reader import BOOL, FLOAT32, STRING, UINT32, UINT64, Field
from arte_edge.gguf.writer import rewrite
from arte_edge.models.artifact import checksums_of
from arte_edge.publish.publishable import accuracy_on, device_title, speeds
from arte_edge.results.locate import read_export
from arte_edge.results.merge import student_lock
from arte_edge.results.student_json import Artifact, write_student

__all__ = ["write_keys"]

_BENCH, _FIDELITY = "arte_edge.bench.", "arte_edge.fidelity."


def _bench_fields(artifact: Artifact, allow_throttled: bool) -> dict[str, Field]:
    found = speeds(artifact, allow_throttled)
    fields = {f"{_BENCH}count": Field(UINT32, len(found))} if found else {}
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
                data = value.encode() if isinstance(value, str) else value
                fields[f"{_BENCH}{i}.{name}"] = Field(kind, data)
    return fields


def _fidelity_fields(artifact: Artifact) -> dict[str, Field]:
    if (metrics := artifact.fidelity.metrics) is None:
        return {}
    found = {
        "kl_mean": metrics.kl_mean,
        "top1_agreement": metrics.top1,
        "ppl_ratio": metrics.perplexity_ratio,
    }
    return {f"{_FIDELITY}{name}": Field(FLOAT32, v) for name, v in found.items() if v is not None}


def write_keys(
    folder: Path, *, allow_throttled: bool = False, note: Callable[[str], None] | None = None
) -> tuple[str, ...]:
    """Write the results of every accepted GGUF into it; return the files that changed.

    Their new checksums are written to ``student.json``. A kill in between leaves an old one there, which the
    next run corrects, since the tensors identify the file.

    Raises:
        InputError: a file's tensors differ from ``student.json``, which leaves it unchanged; or there is no
            readable ``student.json``.
        ArteError: no room for a second copy of a file, or a disk error.
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
    """Rewrite one file; return its entry with its new checksum, and whether the file changed."""
    checksums = checksums_of(path)
    if checksums.tensor_sha256 != artifact.tensor_sha256:
        raise InputError(
            f"{artifact.file}: its tensors are not those that student.json describes",
            "Export it again; results of another file are not written into it.",
        )
    fields = _bench_fields(artifact, allow_throttled) | _fidelity_fields(artifact)
    done = rewrite(path, fields, drop=(_BENCH, _FIDELITY))
    update = {"sha256": done.sha256 or checksums.sha256, "size_bytes": path.stat().st_size}
    return artifact.model_copy(update=update), done.changed

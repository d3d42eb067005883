"""The rates behind a run's ``[deploy]`` table: measured on the device if anybody did, else predicted.

`arte_edge.distill.latency` turns them into a budget of tokens. It cannot look for them itself: the
room that distils knows neither devices nor benchmarks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from arte_edge.device.model_size import ModelShape
from arte_edge.device.profiles import Profile
from arte_edge.distill.config import Deploy
from arte_edge.distill.latency import Rates
from arte_edge.errors import InputError
from arte_edge.models.local import LocalModel
from arte_edge.publish.locate import find_export, read_bench
from arte_edge.publish.predict import READS_FASTER, predict_shape
from arte_edge.publish.recommend.measurements import Measured, from_rows, measured
from arte_edge.publish.recommend.pick import device_names
from arte_edge.results.rows import Row, SpeedRow
from arte_edge.results.student_json import Artifact, read_student

__all__ = ["deploy_rates"]

_CONTEXT_TOKENS = 512  # at which a prediction is made


def deploy_rates(deploy: Deploy, student: LocalModel) -> Rates:
    """Return how fast `deploy.file` of the student runs on `deploy.device`.

    Raises:
        InputError: the device is unknown and was not measured, or no such file was measured and
            none can be predicted.
    """
    profile, names = _device(deploy)
    artifact, best, folder = _measured(deploy, names) if deploy.rates else (None, None, None)
    if best is not None and best.decode:
        if best.prefill:
            return Rates(best.decode, best.prefill, "measured", best.source)
        words = f"{best.source}; prefill assumed to be {READS_FASTER} times as fast"
        return Rates(best.decode, best.decode * READS_FASTER, "predicted", words)
    if profile is None:
        raise InputError(
            f"deploy.device = '{deploy.device}': no such profile, and not measured for {deploy.file}",
            "See `arte-edge devices ls`, or measure it: arte-edge bench FILE, and give deploy.rates.",
        )
    path = folder / artifact.file if folder and artifact else None
    shape = ModelShape.of(path) if path and path.exists() else _shape_of(deploy.file, student)
    guess = predict_shape(shape, profile, _CONTEXT_TOKENS)
    if guess.decode_tokens_per_s is None:
        raise InputError(
            f"deploy.device = '{deploy.device}': nothing is known of its memory, so nothing can be predicted",
            "Measure it: arte-edge bench FILE on the device, and give deploy.rates.",
        )
    rate = guess.decode_tokens_per_s
    words = f"{guess.source}; prefill assumed to be {READS_FASTER} times as fast"
    return Rates(rate, rate * READS_FASTER, "predicted", words)


def _device(deploy: Deploy) -> tuple[Profile | None, frozenset[str]]:
    """Return the profile, None for a fingerprint, and the names that results of it stand under."""
    from arte_edge.device.profiles import find_device

    try:
        profile = find_device(deploy.device)
    except InputError:
        if not deploy.rates:
            raise
        return None, frozenset({deploy.device})
    return profile, device_names(profile) | {deploy.device}


def _measured(deploy: Deploy, names: frozenset[str]) -> tuple[Artifact | None, Measured | None, Path | None]:
    """Return the file that `deploy` means, and what was measured of it.

    Raises:
        InputError: `deploy.rates` leads nowhere.
    """
    given = Path(deploy.rates).expanduser()
    folder = given.parent if given.is_file() else _folder(given)
    rows = read_bench(folder)
    student = read_student(folder)
    artifact = next((a for a in student.artifacts if _means(deploy.file, a)), None) if student else None
    if artifact is not None:
        best, _ = measured(artifact, names, rows)
        return artifact, best, folder
    return None, _of_rows(rows, deploy.file, names), folder


def _folder(given: Path) -> Path:
    """Return where results lie: a folder with a bench.jsonl alone, or an export."""
    return given if (given / "bench.jsonl").is_file() else find_export(given)


def _of_rows(rows: list[Row], file: str, names: frozenset[str]) -> Measured | None:
    mine = [
        row
        for row in rows
        if isinstance(row, SpeedRow) and row.ok and not row.throttled
        if file in (row.quantization, row.model_filename)
        if names & {row.device.profile, row.device.fingerprint} and "qemu" not in row.device.virtual
    ]
    return max(from_rows(mine), key=lambda one: one.decode or 0.0, default=None)


def _means(file: str, artifact: Artifact) -> bool:
    return file in (artifact.quantization, artifact.file, artifact.file.rstrip("/"))


def _shape_of(kind: str, student: LocalModel) -> ModelShape:
    """Return the sizes of the base student as a file of this kind, which nobody has made yet.

    Raises:
        InputError: not a type that we can make.
    """
    from arte_edge.checkpoint import shapes_of
    from arte_edge.export.estimate import predicted_bytes
    from arte_edge.export.formats import parse_list

    checkpoint = student.checkpoint()
    shape = ModelShape.of(checkpoint)
    onnx = kind[:1].islower()
    format = parse_list(None if onnx else kind, kind if onnx else None)[0]
    scale = predicted_bytes(format, shapes_of(checkpoint)) / shape.weight_bytes
    return replace(
        shape,
        name=kind,
        quantization=kind,
        weight_bytes=round(shape.weight_bytes * scale),
        token_bytes=round(shape.token_bytes * scale),
        token_bytes_by_type={},
    )

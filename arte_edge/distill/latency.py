"""The latency budget of the target device: how many tokens an answer may have.

    budget = (max_answer_seconds - prompt_tokens / prefill rate) · decode rate

`prompt_tokens` is the 95th percentile over the validation examples, rendered as for the student, in the
student's own tokens. docs/runs.md says what each stage does with the budget. Drafts are elicited without one:
preferences need short and long ones to choose from. The budget is stored in ``deploy.json``: a later benchmark
does not change a run that has begun.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter

from arte_edge.cache import write_atomic
from arte_edge.distill.config import Deploy
from arte_edge.errors import InputError
from arte_edge.files import json_loads, user_path
from arte_edge.models.resolve import LocalModel

if TYPE_CHECKING:
    from arte_edge.device.model_size import ModelSize
    from arte_edge.device.profiles import Profile
    from arte_edge.results.merge import Measured
    from arte_edge.results.student_json import Artifact

FILE_NAME = "deploy.json"
_CONTEXT_TOKENS = 512  # at which a prediction is made
_LEAST = 8  # tokens: an answer in its tags and a word before it


@dataclass(frozen=True)
class Rates:
    """The prefill and decode rate of one file on one device, in tokens per second, and their source."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    evidence: Literal["measured", "predicted"]
    source: str  # runtime and threads of a measurement, or what a prediction is based on


@dataclass(frozen=True)
class Budget:
    """The budget of a run; `answer_tokens` in tokens of the student."""

    answer_tokens: int
    prompt_tokens: int
    rates: Rates


def budget_tokens(max_answer_seconds: float, prompt_tokens: int, rates: Rates) -> int:
    """Return how many whole tokens of answer fit into the time left after prefill.

    Raises InputError: fewer than an answer needs; says how many seconds would be enough.
    """
    prefill_s = prompt_tokens / rates.prefill_tokens_per_s
    tokens = math.floor((max_answer_seconds - prefill_s) * rates.decode_tokens_per_s + 1e-9)
    if tokens < _LEAST:
        least_s = prefill_s + _LEAST / rates.decode_tokens_per_s
        raise InputError(
            f"deploy.max_answer_seconds = {max_answer_seconds:g}: prefill of {prompt_tokens} prompt tokens "
            f"takes {prefill_s:.2f} s there ({rates.evidence}), which leaves {max(tokens, 0)} tokens to answer",
            f"Set it to {math.ceil(least_s * 10) / 10:g} s or more, or choose a faster file in deploy.file.",
        )
    return tokens


def penalize_length(score: float, tokens: int, most_tokens: int, *, log: bool) -> float:
    """Return a draft's `score` times the share of the draft that the device can generate in time.

    `score` is a probability, of which an estimate may be below zero: that stays. `log`: it is a log-probability in
    nats, to which the logarithm of that share is added. So a draft that is a little too long is a little worse, and
    the ranking of two long drafts is kept.
    """
    share = min(1.0, most_tokens / max(tokens, 1))
    return score + math.log(share) if log else min(score, score * share)


def new_budget(folder: Path, config: Deploy, prompt_tokens: int, rates: Rates) -> Budget:
    """Return the budget of a run and store it in its `folder`.

    Raises InputError: the time is too short for an answer.
    """
    tokens = budget_tokens(config.max_answer_seconds, prompt_tokens, rates)
    budget = Budget(tokens, prompt_tokens, rates)
    document = {"deploy": _settings(config), "budget": asdict(budget)}
    write_atomic(folder / FILE_NAME, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    return budget


def device_rates(config: Deploy, student: LocalModel) -> Rates:
    """Return how fast ``deploy.file`` of the student runs on ``deploy.device``: measured there, else predicted.

    Raises:
        InputError: the device is unknown and was not measured, or no such file was measured and
            none can be predicted.
    """
    from arte_edge.device.model_size import ModelSize
    from arte_edge.device.roofline import PREFILL_FACTOR, predict

    profile, names = _device(config)
    artifact, best, left_out, folder = _measured_file(config, names) if config.rates else (None, None, (), None)
    aside = "".join(f"; {note}" for note in left_out).removesuffix(".")
    if best is not None and best.decode:
        if best.prefill:
            return Rates(best.decode, best.prefill, "measured", best.source)
        source = f"{best.source}; prefill assumed to be {PREFILL_FACTOR} times as fast{aside}"
        return Rates(best.decode, best.decode * PREFILL_FACTOR, "predicted", source)
    if profile is None:
        raise InputError(
            f"deploy.device = '{config.device}': no such profile, and not measured for {config.file}{aside}",
            "See `arte-edge devices ls`, or measure it: arte-edge bench FILE, and set deploy.rates.",
        )
    path = folder / artifact.file if folder and artifact else None
    shape = ModelSize.of(path) if path and path.exists() else _predicted_shape(config.file, student)
    predicted = predict(shape, profile, _CONTEXT_TOKENS)
    if (rate := predicted.decode_tokens_per_s) is None:
        raise InputError(
            f"deploy.device = '{config.device}': its memory bandwidth is unknown, so nothing can be predicted",
            "Measure it: arte-edge bench FILE on the device, and set deploy.rates.",
        )
    source = f"{predicted.source}; prefill assumed to be {PREFILL_FACTOR} times as fast{aside}"
    return Rates(rate, rate * PREFILL_FACTOR, "predicted", source)


def _device(config: Deploy) -> tuple[Profile | None, frozenset[str]]:
    """Return the profile, None for a fingerprint, and the names that its results may have."""
    from arte_edge.device.profiles import find_device

    try:
        profile = find_device(config.device)
    except InputError:
        if not config.rates:
            raise
        return None, frozenset({config.device})
    return profile, profile.names | {config.device}


def _measured_file(
    config: Deploy, names: frozenset[str]
) -> tuple[Artifact | None, Measured | None, tuple[str, ...], Path | None]:
    """Return the exported file that ``deploy.file`` names, its measurement, what was left out, and their folder.

    Raises InputError: ``deploy.rates`` is no folder or file with results.
    """
    from arte_edge.results.merge import best_of_rows, measured
    from arte_edge.results.student_json import find_export, read_bench, read_student

    given = user_path(config.rates)
    has_rows = given.is_dir() and (given / "bench.jsonl").is_file()
    folder = given.parent if given.is_file() else given if has_rows else find_export(given)
    rows, student, file = read_bench(folder), read_student(folder), config.file
    for artifact in student.artifacts if student else ():
        if file in (artifact.quantization, artifact.file, artifact.file.rstrip("/")):
            return artifact, *measured(artifact, names, rows), folder
    return None, *best_of_rows(rows, file, names), folder


def _predicted_shape(kind: str, student: LocalModel) -> ModelSize:
    """Return the sizes of the base student as a file of this kind, before it is exported.

    Raises InputError: not a type that can be exported.
    """
    from arte_edge.checkpoint import shapes_of
    from arte_edge.device.model_size import ModelSize
    from arte_edge.models.artifact import parse_list, predicted_bytes

    checkpoint = student.checkpoint()
    shape = ModelSize.of(checkpoint)
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


def stored_budget(folder: Path, config: Deploy) -> Budget | None:
    """Return the budget decided from the same settings; None if there is no readable one."""
    try:
        document = json_loads((folder / FILE_NAME).read_bytes())
        if document["deploy"] != _settings(config):
            return None
        return TypeAdapter(Budget).validate_python(document["budget"])
    except (OSError, ValueError, KeyError, TypeError):  # pydantic's error is a ValueError
        return None


def _settings(config: Deploy) -> dict[str, Any]:
    """Return the settings that decide a budget; how a run uses it is not part of them."""
    return config.model_dump(mode="json", exclude={"draws"})

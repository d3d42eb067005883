"""The keys of a model card's front matter: lineage, licence, library, tags and the measured results.

Names follow the Hub (hub-docs: modelcard.md). An export holds quantized files: named after the
student's own repository it is ``quantized``, and without one ``finetune`` of the student's base,
since that is what it comes from on the Hub. ``metrics[].args`` is the only structured place for
quantization, runtime, threads, device and interval. A score is
listed only with the file it was measured on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arte_edge.export.provenance import PAPER
from arte_edge.publish import publishable
from arte_edge.publish.card.front_matter import MARK
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.student_json import Artifact, Evaluation, Speed, StudentFile

__all__ = ["CardOptions", "head_keys", "hub_id", "license_keys", "model_index"]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Of https://huggingface.co/docs/hub/repositories-licenses those that models carry; others are named beside.
_LISTED = re.compile(
    r"apache-2\.0|mit|bsd-[23]-clause|cc0-1\.0|cc-by(-nc)?(-sa)?-4\.0|[al]?gpl-3\.0|mpl-2\.0|unlicense|gemma|"
    r"openrail|bigscience-openrail-m|creativeml-openrail-m|llama2|llama3(\.[123])?|llama4|other|unknown"
)


@dataclass(frozen=True)
class CardOptions:
    """What only a person knows of a card. Ids are those of the Hub."""

    base_model: str = ""  # the repository of the 16-bit student
    datasets: tuple[str, ...] = ()
    license: str = ""
    repo: str = ""  # where the card will be, for links to its raw rows
    allow_throttled: bool = False
    checkpoint: bool = False  # the card of the 16-bit student itself


def hub_id(name: str) -> str:
    """Return the repository in a name such as ``user/repo@revision:file``; empty if it is none."""
    repository = name.partition("@")[0].partition(":")[0]
    return repository if _HUB_ID.fullmatch(repository) else ""


def license_keys(name: str) -> dict[str, str]:
    """Return the licence as the Hub wants it; one that it does not list is ``other`` with its name."""
    if not name:
        return {}
    if _LISTED.fullmatch(name.lower()):
        return {"license": name.lower()}
    return {"license": "other", "license_name": name}


def head_keys(student: StudentFile, options: CardOptions) -> dict[str, Any]:
    """Return every key but ``model-index``, those without a value left out."""
    lineage = student.lineage
    base = options.base_model or (hub_id(lineage.base.name) if lineage.base else "")
    tuned = lineage.tuning is not None or lineage.source in ("run", "adapter")
    quantized = not options.checkpoint and bool(options.base_model or not tuned)
    formats: set[str] = {artifact.format for artifact in publishable.files(student)}
    tags = ["arte-edge", "text-generation"]
    if lineage.method == "arte":
        tags += ["distillation", PAPER.replace("arXiv", "arxiv")]
    if not options.checkpoint:
        tags += [tag for tag in ("gguf", "onnx") if any(name.startswith(tag) for name in formats)]
    if student.tokenizer.chat_template_sha256:
        tags.append("conversational")
    keys: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": ("quantized" if quantized else "finetune") if base else "",
        "datasets": list(options.datasets),
        **license_keys(options.license or (lineage.base.license if lineage.base else "")),
        "library_name": _library(formats, options.checkpoint),
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    return {key: value for key, value in keys.items() if value}


def _library(formats: set[str], checkpoint: bool) -> str:
    if checkpoint:
        return "transformers"
    if "gguf" in formats:
        return "llama-cpp-python"
    return "onnxruntime-genai" if "onnx-genai" in formats else "onnx"


def model_index(student: StudentFile, options: CardOptions) -> list[dict[str, Any]]:
    """Return our part of ``model-index``; empty if there is nothing to publish.

    Built by huggingface_hub, so that it is what the Hub's own reader expects.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    url = f"https://huggingface.co/{options.repo}/blob/main/bench.jsonl" if options.repo else None

    def result(accuracy: PairedAccuracy, name: str, args: dict[str, Any]) -> Any:
        task = accuracy.task or student.lineage.task or "task"
        return EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=task,
            dataset_name=task,
            dataset_split=accuracy.split,
            metric_type="accuracy",
            metric_name=f"accuracy, {name}",
            metric_value=round(accuracy.accuracy, 4),
            metric_args={**args, **_interval(accuracy), **MARK},
            source_url=url,
            source_name="arte-edge bench" if url else None,
        )

    if options.checkpoint:
        own: Sequence[PairedAccuracy] = publishable.evaluations(student.student_evaluations)
        own = own or ([student.student_accuracy] if student.student_accuracy else [])
        dtype = student.student.dtype
        results = [result(one, f"{dtype} checkpoint", _where(one) | {"quantization": dtype}) for one in own]
    else:
        results = [
            result(one, artifact.quantization, _what(artifact) | _where(one, artifact))
            for artifact in publishable.files(student)
            for one in publishable.accuracies(artifact)
        ] + [
            metric
            for artifact in publishable.files(student)
            for speed in publishable.speeds(artifact, options.allow_throttled)
            for metric in _rates(artifact, speed, url)
        ]
    return list(eval_results_to_model_index(student.student.name, results)) if results else []


def _rates(artifact: Artifact, speed: Speed, url: str | None) -> list[Any]:
    """Return the rates of one file on one device as metrics; the Hub has no field of their own for them."""
    from huggingface_hub import EvalResult

    rates = {
        "decode_tokens_per_s": speed.decode_tokens_per_s,
        "prefill_tokens_per_s": speed.prefill_tokens_per_s,
    }
    args = _what(artifact) | {
        "device": publishable.device_title(speed),
        "threads": speed.threads,
        "runtime": speed.runtime,
        "depth": speed.n_depth or None,
        "throttled": speed.throttled,
        **MARK,
    }
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type="llama-bench",
            dataset_name="pp and tg tests of llama-bench",
            metric_type=name,
            metric_name=f"{name}, {artifact.quantization}",
            metric_value=round(value, 2),
            metric_args={key: given for key, given in args.items() if given is not None},
            source_url=url,
            source_name="arte-edge bench" if url else None,
        )
        for name, value in rates.items()
        if value is not None
    ]


def _what(artifact: Artifact) -> dict[str, Any]:
    return {
        "file": artifact.file,
        "format": artifact.format,
        "quantization": artifact.quantization,
        "tensor_sha256": artifact.tensor_sha256,
    }


def _where(accuracy: PairedAccuracy, artifact: Artifact | None = None) -> dict[str, Any]:
    """Return what ran it: the gate's was measured where the file was made, by the runtime named there."""
    if isinstance(accuracy, Evaluation):
        found = {
            "device": publishable.device_title(accuracy),
            "threads": accuracy.threads,
            "runtime": accuracy.runtime,
        }
        return {key: value for key, value in found.items() if value}
    return {"runtime": artifact.fidelity.runtime} if artifact and artifact.fidelity.runtime else {}


def _interval(accuracy: PairedAccuracy) -> dict[str, Any]:
    return {
        "n": accuracy.n,
        "low": round(accuracy.low, 4),
        "high": round(accuracy.high, 4),
        "confidence": 0.95,
    }

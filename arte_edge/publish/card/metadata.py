"""The keys of a model card's front matter: lineage, licence, library, tags and the measured results.

Names follow the Hub (hub-docs: modelcard.md). An export holds quantized files: named after the student's own repository
it is ``quantized``, and without one ``finetune`` of the student's base, since that is what it comes from on the Hub.
``metrics[].args`` is the only structured place for quantization, runtime, threads, device and interval. A score is
listed only with the file it was measured on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from arte_edge.export.source import PAPER
from arte_edge.publish import publishable
from arte_edge.publish.card.front_matter import MARK
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.student_json import Artifact, Evaluation, StudentFile

_LLAMA_BENCH = {"dataset_type": "llama-bench", "dataset_name": "pp and tg tests of llama-bench"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The licences that models have of those in https://huggingface.co/docs/hub/repositories-licenses.
_LISTED = re.compile(
    r"apache-2\.0|mit|bsd-[23]-clause|cc0-1\.0|cc-by(-nc)?(-sa)?-4\.0|[al]?gpl-3\.0|mpl-2\.0|unlicense|gemma|"
    r"openrail|bigscience-openrail-m|creativeml-openrail-m|llama2|llama3(\.[123])?|llama4|other|unknown"
)


@dataclass(frozen=True)
class CardOptions:
    """What a card needs besides ``student.json``. Ids are those of the Hub."""

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
    """Return the licence in the Hub's form; one that the Hub does not list is ``other`` with its name."""
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
    tags += ["distillation"] if lineage.method else []
    tags += [PAPER.replace("arXiv", "arxiv")] if lineage.is_arte else []
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

    Built by huggingface_hub, so that it is what the Hub's own reader expects. Rates are metrics too, since
    the Hub has no field of their own for them.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    url = f"https://huggingface.co/{options.repo}/blob/main/bench.jsonl" if options.repo else None

    def metric(kind: str, name: str, value: float, args: dict[str, Any], **dataset: Any) -> Any:
        return EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            metric_type=kind,
            metric_name=f"{kind}, {name}",
            metric_value=value,
            metric_args={**{key: given for key, given in args.items() if given is not None}, **MARK},
            source_url=url,
            source_name="arte-edge bench" if url else None,
            **dataset,
        )

    def accuracy(found: PairedAccuracy, name: str, args: dict[str, Any]) -> Any:
        task = found.task or student.lineage.task or "task"
        low, high = round(found.low, 4), round(found.high, 4)
        interval = {"n": found.n, "low": low, "high": high, "confidence": 0.95}
        split = {"dataset_type": task, "dataset_name": task, "dataset_split": found.split}
        return metric("accuracy", name, round(found.accuracy, 4), {**args, **interval}, **split)

    results = []
    if options.checkpoint:
        dtype = student.student.dtype
        own = publishable.accuracies(student)
        on_devices = [one for one in own if isinstance(one, Evaluation)]
        for one in on_devices or own:
            results.append(accuracy(one, f"{dtype} checkpoint", {**_measured_on(one), "quantization": dtype}))
    for artifact in [] if options.checkpoint else publishable.files(student):
        for one in publishable.accuracies(artifact):
            args = {**_file(artifact), **_measured_on(one, artifact)}
            results.append(accuracy(one, artifact.quantization, args))
    for artifact in [] if options.checkpoint else publishable.files(student):
        for speed in publishable.speeds(artifact, options.allow_throttled):
            args = {
                **_file(artifact),
                "device": publishable.device_title(speed),
                "threads": speed.threads,
                "runtime": speed.runtime,
                "depth": speed.n_depth or None,
                "throttled": speed.throttled,
            }
            for kind in ("decode_tokens_per_s", "prefill_tokens_per_s"):
                if (rate := getattr(speed, kind)) is not None:
                    results.append(metric(kind, artifact.quantization, round(rate, 2), args, **_LLAMA_BENCH))
    return list(eval_results_to_model_index(student.student.name, results)) if results else []


def _file(artifact: Artifact) -> dict[str, str]:
    return {
        "file": artifact.file,
        "format": artifact.format,
        "quantization": artifact.quantization,
        "tensor_sha256": artifact.tensor_sha256,
    }


def _measured_on(accuracy: PairedAccuracy, artifact: Artifact | None = None) -> dict[str, Any]:
    """Return device, threads and runtime; the gate measures at export, with the runtime that it names."""
    if isinstance(accuracy, Evaluation):
        return {
            "device": publishable.device_title(accuracy),
            "threads": accuracy.threads,
            "runtime": accuracy.runtime or None,
        }
    return {"runtime": artifact.fidelity.runtime or None} if artifact else {}

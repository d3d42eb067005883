"""Merge a LoRA adapter into its 16-bit base on the CPU, and check the logits of the result.

Merging into a quantized base is the most common way to damage a fine-tuned model. Here the base must be
16-bit, the sum is computed in 32 bits and rounded once, and the logits of base plus adapter are compared with
those of the merged model before the folder gets its name.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.cache import Progress, cleanup_on_full_disk, rename_into_place, sha256_file
from arte_edge.checkpoint import reject_quantized
from arte_edge.errors import InputError
from arte_edge.extras import need
from arte_edge.files import json_loads
from arte_edge.models.resolve import LocalModel, resolve
from arte_edge.results.student_json import Merge

__all__ = ["Adapter", "merge", "read_adapter"]

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter's folder and its base model."""

    folder: Path
    base_ref: str
    base: LocalModel
    rank: int

    @property
    def sha256(self) -> str:
        return sha256_file(self.folder / _WEIGHTS)


def read_adapter(
    folder: Path, base: str | None = None, *, offline: bool = False, progress: Progress | None = None
) -> Adapter:
    """Return the adapter in `folder` and its base, downloaded if necessary.

    Args:
        base: a model reference, instead of the one in the adapter's config.

    Raises InputError: not a LoRA adapter in safetensors, or the base does not exist.
    """
    path = folder / "adapter_config.json"
    try:
        config: dict[str, Any] = json_loads(path.read_text("utf-8"))
        kind, named = str(config.get("peft_type", "")).upper(), config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not readable as JSON", "Save the adapter again.") from error
    if kind != "LORA":
        raise InputError(f"{path}: peft_type is '{kind}', only LoRA adapters can be merged")
    if not (folder / _WEIGHTS).is_file():
        raise InputError(
            f"{folder}: no {_WEIGHTS}", "Save the adapter as safetensors; pickles are never opened."
        )
    ref = base or named
    if not isinstance(ref, str) or not ref:
        raise InputError(f"{path}: names no base model", "Name it with --base.")
    beside = folder / ref
    model = resolve(
        str(beside) if not Path(ref).exists() and beside.is_dir() else ref, offline=offline, progress=progress
    )
    return Adapter(folder, ref, model, int(config.get("r") or 0))


def merge(adapter: Adapter, base: Path, out: Path, prompts: Sequence[str]) -> Merge:
    """Write the base checkpoint with the adapter merged into it to `out`, atomically.

    Args:
        base: the checkpoint folder of ``adapter.base``.
        prompts: rendered texts; logits are compared at each of their tokens.

    Raises:
        InputError: the base is quantized, or the adapter does not fit it.
        ArteError: packages are missing, the disk is full, or the merged model's logits differ.
    """
    need("train", "Merging an adapter")
    reject_quantized(base, "the adapter's base")
    from arte_edge.distill.train.lora_merge import check_merge, merge_adapter

    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # left by a killed process
    out.parent.mkdir(parents=True, exist_ok=True)
    with cleanup_on_full_disk(staging, "the merged student"):
        try:
            merge_adapter(base, adapter.folder, staging)
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(
                f"{adapter.folder}: does not fit its base: {str(error).strip().splitlines()[0][:200]}",
                "Name the model that it was trained on with --base.",
            ) from error
        check = check_merge(base, adapter.folder, staging, prompts)
        shutil.rmtree(out, ignore_errors=True)
        rename_into_place(staging, out)
    return Merge(
        adapter_sha256=adapter.sha256,
        max_abs_diff=check.max_abs_diff,
        mean_abs_diff=check.mean_abs_diff,
        update_mean_abs=check.update_mean_abs,
        top1_agreement=check.top1_agreement,
        tokens=check.tokens,
    )

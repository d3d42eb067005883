"""Merge a LoRA adapter into its 16-bit base on the CPU, and check the logits of the result.

Merging into a quantized base is the most common way to damage a fine-tuned model. Here the base must be
16-bit, the sum is computed in 32 bits and rounded once, and the logits of base plus adapter are compared with
those of the merged model before the folder gets its name.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from arte_edge.cache import Progress, cleanup_on_full_disk, rename_into_place, sha256_file
from arte_edge.errors import ArteError, InputError
from arte_edge.extras import need
from arte_edge.model_folder import ADAPTER_WEIGHTS, read_adapter_config, tokenizer_files
from arte_edge.models.resolve import LocalModel, resolve
from arte_edge.results.student_json import Merge

_NAME_IT = "Name the model that it was trained on with --base."


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter's folder and its base model."""

    folder: Path
    base_ref: str
    base: LocalModel

    @property
    def sha256(self) -> str:
        return sha256_file(self.folder / ADAPTER_WEIGHTS)

    @property
    def files_sha256(self) -> list[str]:
        """The checksums of everything that a merge takes from the folder."""
        names = (ADAPTER_WEIGHTS, "adapter_config.json", *sorted(tokenizer_files(self.folder)))
        return [sha256_file(self.folder / name) for name in names]


def read_adapter(
    folder: Path, base: str | None = None, *, offline: bool = False, progress: Progress | None = None
) -> Adapter:
    """Return the adapter in `folder` and its base, downloaded if necessary.

    Args:
        base: a model reference, instead of the one in the adapter's config.

    Raises InputError: not a LoRA adapter in safetensors, or its base cannot be resolved.
    """
    path, ref = folder / "adapter_config.json", base
    config = read_adapter_config(folder)
    if ref is None:
        ref = config.get("base_model_name_or_path")
        if not isinstance(ref, str) or not ref:
            raise InputError(f"{path}: names no base model", _NAME_IT)
    try:
        beside = not Path(ref).exists() and (folder / ref).is_dir()
        model = resolve(str(folder / ref) if beside else ref, offline=offline, progress=progress)
    except (ArteError, OSError, ValueError) as error:  # Python's own for a name that no path can have
        if base:
            raise
        detail = error.message if isinstance(error, ArteError) else str(error)
        raise InputError(f"{path}: its base_model_name_or_path cannot be used: {detail}", _NAME_IT) from error
    return Adapter(folder, ref, model)


def merge(adapter: Adapter, base: Path, out: Path, prompts: Sequence[str]) -> Merge:
    """Write the base checkpoint with the adapter merged into it to `out`, atomically.

    Args:
        base: the checkpoint folder of ``adapter.base``.
        prompts: rendered texts; logits are compared at each of their tokens.

    Raises:
        InputError: the adapter does not fit the base.
        ArteError: packages are missing, the disk is full, or the merged model's logits differ.
    """
    need("train", "Merging an adapter")
    from arte_edge.distill.train.lora_merge import check_merge, merge_adapter

    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # left by a killed process
    out.parent.mkdir(parents=True, exist_ok=True)
    with cleanup_on_full_disk(staging, "the merged student"):
        merge_adapter(base, adapter.folder, staging)
        check = check_merge(base, adapter.folder, staging, prompts)
        shutil.rmtree(out, ignore_errors=True)
        rename_into_place(staging, out)
    return Merge(adapter_sha256=adapter.sha256, **asdict(check))

"""Write a trained model as a 16-bit checkpoint; merge a LoRA adapter into its base on the CPU, and check the merge.

A written checkpoint is the base's folder with other weights: tokenizer and configuration are the base's own, so that
prompts are tokenized alike before and after training; those of an adapter that was trained with others replace them.
Fine-tuning moves a weight by little, and bfloat16 has eight bits for it: after four LoRA steps on SmolLM2-135M,
rounding to bfloat16 moved the logits by half as much as the training had, rounding to float16 by a twentieth. Only
Gemma's activations overflow float16, so its checkpoints are bfloat16.

Merging into a quantized base is the most common way to damage a fine-tuned model. Here the base must be 16-bit, the
sum is computed in 32 bits and rounded once, and the logits of base plus adapter are compared with those of the merged
model before the folder gets its name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arte_edge import transformers_load as hf
from arte_edge.cache import Progress, cleanup_on_full_disk, rename_into_place, sha256_file
from arte_edge.checkpoint import read_config, read_tensors
from arte_edge.distill.train.common import Encoder
from arte_edge.errors import ArteError, InputError
from arte_edge.extras import need
from arte_edge.files import read_json
from arte_edge.frozen_weights import load_frozen
from arte_edge.model_folder import ADAPTER_WEIGHTS, TOKENIZER_FILES, look, read_adapter_config, tokenizer_files
from arte_edge.models.resolve import LocalModel, resolve
from arte_edge.results.student_json import Merge
from arte_edge.runtimes.transformers.placement import overflows_float16
from arte_edge.transformers_load import MergeCheck

_NAME_IT = "Name the model that it was trained on with --base."
_OWN = ("config.json", "README.md", "*.safetensors", "model.safetensors.index.json")


def sixteen_bits(base: Path, dtype: str) -> str:
    """Return `dtype`, or for "auto" the one for the model in the folder `base`."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if overflows_float16(base) else "float16"


def write_checkpoint(model: Any, base: Path, out: Path, dtype: str = "auto", adapter: Path | None = None) -> Path:
    """Write `model` in 16 bits, with the configuration and tokenizer of `base`, to the folder `out`.

    Args:
        adapter: the folder of the adapter that was merged: its tokenizer files come first.

    Raises ArteError: a weight does not fit into 16 bits, or training made it infinite.
    """
    import torch

    dtype = sixteen_bits(base, dtype)
    model.to(getattr(torch, dtype))
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ArteError(
                f"{name} holds values that are not finite in {dtype}",
                "If the loss is finite, set dtype to bfloat16; else training diverged: lower the learning rate.",
            )
    model.save_pretrained(out)
    skipped = {*TOKENIZER_FILES, *look(base).others}
    for file in sorted(base.iterdir()):
        if file.is_file() and file.name not in skipped and not any(map(file.match, _OWN)):
            shutil.copyfile(file, out / file.name)
    for name, file in tokenizer_files(base, adapter).items():
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, out / name)
    config = read_config(base)
    config.pop("torch_dtype", None)  # the key's name before transformers 5
    # An adapter may bring tokens and an output matrix of its own.
    trained = {key: getattr(model.config, key) for key in ("tie_word_embeddings", "vocab_size")}
    _write_json(out / "config.json", config | {"dtype": dtype} | (trained if adapter else {}))
    if adapter and tokenizer_files(adapter):
        _end_as_trained(base, adapter, out)
    return out


def _end_as_trained(base: Path, adapter: Path, out: Path) -> None:
    """Make the end token of the adapter's tokenizer the merged model's, unless it already is one of several."""
    tokenizer, n_row = hf.load_tokenizer(out), read_config(out)["vocab_size"]
    if len(tokenizer) > max(n_row, len(hf.load_tokenizer(base))):
        raise InputError(
            f"{adapter}: its tokenizer has {len(tokenizer)} tokens, and the model has embeddings for {n_row}",
            'Train with modules_to_save = ["embed_tokens", "lm_head"], or save with save_embedding_layers=True.',
        )
    eos = tokenizer.eos_token_id
    for name in ("config.json", "generation_config.json"):
        settings = read_json(out / name)
        ends = settings.get("eos_token_id")
        if settings and eos is not None and eos not in (ends if isinstance(ends, list) else [ends]):
            _write_json(out / name, settings | {"eos_token_id": eos})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")


def merge_adapter(base: Path, adapter: Path, out: Path, dtype: str = "auto") -> Path:
    """Write `base` with the LoRA in `adapter` merged to the folder `out`; return `out`.

    The sum is made in float32 on the CPU and rounded once.

    Raises InputError: the adapter does not fit; ArteError: as `write_checkpoint`.
    """
    import torch

    merged = hf.merge_attached(hf.attach_adapter(hf.load_model(base, torch.float32), adapter))
    return write_checkpoint(merged, base, out, dtype, adapter)


def check_merge(base: Path, adapter: Path, merged: Path, prompts: Sequence[str]) -> MergeCheck:
    """Compare the logits of base plus adapter with those of `merged`, at every token of `prompts`.

    Raises ArteError: most of the adapter's effect is lost, or the most likely token differs too often.
    """
    import torch

    result, tokenizer = load_frozen(merged), hf.load_tokenizer(merged)
    texts = [Encoder(tokenizer).prompt(prompt) for prompt in prompts] + [hf.probe_ids(result)]
    got = hf.logits_of(result, texts)
    del result  # one model in memory at a time
    # Whole matrices, such as those of added tokens, replace parameters of the base: 16-bit weights are none.
    only_lora = all(".lora_" in name for name in read_tensors(adapter / ADAPTER_WEIGHTS))
    model = load_frozen(base) if only_lora else hf.load_model(base, torch.float32)
    n_row = model.get_input_embeddings().weight.shape[0]
    before = hf.logits_of(model, [[min(token, n_row - 1) for token in ids] for ids in texts])
    wanted = hf.logits_of(hf.attach_adapter(model, adapter), texts)
    return hf.compare_merge(str(merged), before, wanted, got, str(read_config(merged).get("dtype")))


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
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # left by a killed process
    out.parent.mkdir(parents=True, exist_ok=True)
    with cleanup_on_full_disk(staging, "the merged student"):
        merge_adapter(base, adapter.folder, staging)
        check = check_merge(base, adapter.folder, staging, prompts)
        shutil.rmtree(out, ignore_errors=True)
        rename_into_place(staging, out)
    return Merge(adapter_sha256=adapter.sha256, **asdict(check))

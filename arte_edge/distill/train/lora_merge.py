"""Write a trained model as a 16-bit checkpoint, merge a LoRA adapter into its base, check the merge.

A written checkpoint is the base's folder with other weights: tokenizer and configuration are the base's own, so that
prompts are tokenized alike before and after training. Fine-tuning moves a weight by little, and bfloat16 has eight bits
for it: after four LoRA steps on SmolLM2-135M, rounding to bfloat16 moved the logits by half as much as the training
had, rounding to float16 by a twentieth. Only Gemma's activations overflow float16, so its checkpoints are bfloat16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.distill.train.common import Encoder, load
from arte_edge.errors import ArteError
from arte_edge.runtimes.transformers.placement import overflows_float16

if TYPE_CHECKING:
    import torch

__all__ = ["MergeCheck", "check_merge", "merge_adapter", "sixteen_bits", "write_checkpoint"]

_OWN = ("config.json", "README.md", "model*.safetensors", "model.safetensors.index.json")
_MIN_TOP1 = 0.95  # rounding can flip a tie between two tokens, rarely more
_MAX_LOST = 0.75  # of the update; a merge without the adapter loses 1.0
_NO_UPDATE = 0.05  # mean move of a logit below which there is nothing to lose


@dataclass(frozen=True)
class MergeCheck:
    """How far the merged checkpoint is from base plus adapter, in logits."""

    max_abs_diff: float
    mean_abs_diff: float
    update_mean_abs: float  # mean change of the base's logits by the adapter
    top1_agreement: float  # share of positions with the same most likely token
    tokens: int


def sixteen_bits(base: Path, dtype: str) -> str:
    """Return `dtype`, or for "auto" the one for the model in the folder `base`."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if overflows_float16(base) else "float16"


def write_checkpoint(model: Any, base: Path, out: Path, dtype: str = "auto") -> Path:
    """Write `model` in 16 bits, with the tokenizer and configuration of `base`, to the folder `out`.

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
    for file in sorted(base.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in _OWN):
            shutil.copyfile(file, out / file.name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the key's name before transformers 5
    text = json.dumps(config | {"dtype": dtype}, indent=2, ensure_ascii=False, sort_keys=True)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")
    return out


def merge_adapter(base: Path, adapter: Path, out: Path, dtype: str = "auto") -> Path:
    """Write `base` with the LoRA in `adapter` merged to the folder `out`; return `out`.

    The sum is made in float32 on the CPU and rounded once.

    Raises ArteError: as `write_checkpoint`.
    """
    from peft import PeftModel

    model, _ = load(base, frozen=False)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    return write_checkpoint(merged, base, out, dtype)


def check_merge(base: Path, adapter: Path, merged: Path, prompts: Sequence[str]) -> MergeCheck:
    """Compare the logits of base plus adapter with those of `merged`, at every token of `prompts`.

    Raises ArteError: most of the adapter's effect is lost, or the most likely token differs too often.
    """
    import torch
    from peft import PeftModel

    model, tokenizer = load(base, frozen=False)
    texts = [Encoder(tokenizer).prompt(prompt) for prompt in prompts]
    before = _logits(model, texts)
    wanted = _logits(PeftModel.from_pretrained(model, str(adapter)), texts)
    del model  # one model in memory at a time
    got = _logits(load(merged, frozen=False)[0], texts)
    diff = (got - wanted).abs()
    check = MergeCheck(
        max_abs_diff=float(diff.max()),
        mean_abs_diff=float(diff.mean()),
        update_mean_abs=float((before - wanted).abs().mean()),
        top1_agreement=float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
        tokens=len(got),
    )
    lost = check.update_mean_abs > _NO_UPDATE and check.mean_abs_diff > _MAX_LOST * check.update_mean_abs
    if lost or not torch.isfinite(diff).all() or check.top1_agreement < _MIN_TOP1:
        raise ArteError(
            f"{merged}: not the same model as its base with the adapter. Its logits are off by "
            f"{check.mean_abs_diff:.3g} in the mean, the adapter's whole effect is {check.update_mean_abs:.3g}; "
            f"the first choice agrees at {check.top1_agreement:.1%} of tokens",
            "Set dtype to float16, train for longer, or train all weights.",
        )
    return check


def _logits(model: Any, texts: Sequence[list[int]]) -> torch.Tensor:
    """Return the logits ``[n_token, n_vocab]`` of all texts, one after another."""
    import torch

    model.eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0].float() for ids in texts])

"""Fold a LoRA adapter into its base, write a 16-bit checkpoint, and check that nothing was lost.

A written checkpoint is the base's folder with other weights: the tokenizer's files
and the configuration are the base's own, so that prompts are cut into the same
tokens before and after training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.distill.train.common import load
from arte_edge.distill.train.tokens import Encoder
from arte_edge.errors import ArteError

if TYPE_CHECKING:
    import torch

__all__ = ["MergeCheck", "check_merge", "merge_adapter", "write_checkpoint"]

_OWN = ("config.json", "README.md", "model*.safetensors", "model.safetensors.index.json")
_MIN_TOP1 = 0.97  # rounding to 16 bits may turn a tie between two words, no more


@dataclass(frozen=True)
class MergeCheck:
    """How far the merged checkpoint is from base plus adapter."""

    max_abs_diff: float  # of any logit
    mean_abs_diff: float
    top1_agreement: float  # share of positions whose most likely word is the same
    tokens: int


def write_checkpoint(model: Any, base: Path, out: Path, dtype: str) -> Path:
    """Write `model` in 16 bits, with the tokenizer and configuration of `base`, to the folder `out`."""
    import torch

    model.to(getattr(torch, dtype)).save_pretrained(out)
    for file in sorted(base.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in _OWN):
            shutil.copyfile(file, out / file.name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the key's name before transformers 5
    text = json.dumps(config | {"dtype": dtype}, indent=2, ensure_ascii=False, sort_keys=True)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")
    return out


def merge_adapter(base: Path, adapter: Path, out: Path, dtype: str = "bfloat16") -> Path:
    """Write `base` with the LoRA in `adapter` folded in to the folder `out`; return `out`.

    The sum is made in float32 on the CPU and rounded once.
    """
    from peft import PeftModel

    model, _ = load(base, frozen=False)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    return write_checkpoint(merged, base, out, dtype)


def check_merge(
    base: Path, adapter: Path, merged: Path, prompts: Sequence[str], tolerance: float = 1.0
) -> MergeCheck:
    """Compare the logits of base plus adapter with those of `merged`, at every token of `prompts`.

    Raises:
        ArteError: a logit differs by more than `tolerance`, or the most likely word at too many positions.
    """
    import torch
    from peft import PeftModel

    model, tokenizer = load(base, frozen=False)
    texts = [Encoder(tokenizer).prompt(prompt) for prompt in prompts]
    wanted = _logits(PeftModel.from_pretrained(model, adapter), texts)
    del model  # one model in memory at a time
    got = _logits(load(merged, frozen=False)[0], texts)
    diff = torch.cat([(a - b).abs().flatten() for a, b in zip(got, wanted, strict=True)])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(got, wanted, strict=True)])
    check = MergeCheck(
        max_abs_diff=float(diff.max()),
        mean_abs_diff=float(diff.mean()),
        top1_agreement=float(same.float().mean()),
        tokens=len(same),
    )
    if check.max_abs_diff > tolerance or check.top1_agreement < _MIN_TOP1:
        raise ArteError(
            f"{merged}: not the same model as its base with the adapter: a logit differs by "
            f"{check.max_abs_diff:.3g}, the first choice agrees at {check.top1_agreement:.1%} of tokens",
            "A lower learning rate keeps the update within 16 bits; or train all weights.",
        )
    return check


def _logits(model: Any, texts: Sequence[list[int]]) -> list[torch.Tensor]:
    """Return the logits ``[n_token, n_vocab]`` of each text."""
    import torch

    model.eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].float() for ids in texts]

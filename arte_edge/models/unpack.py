"""The child process that turns a GGUF into a checkpoint: ``python -m arte_edge.models.unpack GGUF OUT``.

It is a process of its own so that a lack of memory ends it and not the run, all of
its memory comes back, and the chatter of the libraries stays out of our progress.
It tells its parent in JSON lines: ``{"step": …}``, or ``{"error": …, "hint": …}``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arte_edge.cache import FULL_MARKS, DiskFull
from arte_edge.errors import ArteError, InputError
from arte_edge.models.gguf_header import GgufHeader, read_header
from arte_edge.models.gguf_tokens import check_tokenizer, mend_pre_tokenizer

__all__ = ["main", "unpack"]

_PROBE = "The quick brown fox"
# Loading twice must give the same numbers but for the order in which they are added up.
_LOGIT_TOLERANCE = 1e-2


def unpack(header: GgufHeader, out: Path, tell: Callable[[str], None]) -> None:
    """Write the tokenizer and the bfloat16 weights of a GGUF to `out`, load both again and compare.

    Raises:
        InputError: an architecture that transformers cannot read from GGUF.
        ArteError: the disk is full, or the result does not hold.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, file = header.path.parent, header.path.name
    tell("reading the tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        mend_pre_tokenizer(tokenizer, header)
        tokenizer.chat_template = tokenizer.chat_template or header.chat_template
        tokenizer.save_pretrained(out)
        tell("reading the weights")
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.bfloat16, **_dense_weights()
        )
    except ValueError as error:
        raise InputError(
            f"{header.path}: transformers cannot read a '{header.architecture}' GGUF ({error})",
            "Give the original checkpoint (a folder or its Hub id) instead.",
        ) from error
    _clear_marks(model)
    expected = _logits(model, tokenizer)
    tell("writing the checkpoint")
    try:
        model.save_pretrained(out)
    except Exception as error:  # safetensors has an error class of its own, with the reason in its text
        if any(mark in str(error) for mark in FULL_MARKS):
            raise DiskFull(out, "the checkpoint") from error
        raise
    del model
    gc.collect()  # two copies of a large teacher do not fit into a small memory
    tell("checking the checkpoint")
    again = AutoTokenizer.from_pretrained(out)
    check_tokenizer(again, header)
    found = _logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16), again)
    if found.shape != expected.shape or not (found - expected).abs().max() <= _LOGIT_TOLERANCE:
        raise ArteError(
            f"{header.path}: the written checkpoint does not give the logits that its GGUF gives",
            "Please report this with the versions of torch and transformers.",
        )


def _dense_weights() -> dict[str, Any]:
    """Return the option that keeps newer transformers from leaving the weights quantized."""
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _clear_marks(model: Any) -> None:
    """Take off the marks of a quantized model, with which `save_pretrained` refuses the dense weights."""
    model.hf_quantizer = None
    for mark in ("is_quantized", "quantization_method"):
        if hasattr(model, mark):
            setattr(model, mark, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _logits(model: Any, tokenizer: Any) -> Any:
    """Return logits ``[n_token, n_vocabulary]`` of a short text, as float32."""
    import torch

    with torch.inference_mode():
        logits = model(**tokenizer(_PROBE, return_tensors="pt")).logits[0].float()
    if not torch.isfinite(logits).all():
        raise ArteError(f"The weights of {tokenizer.name_or_path} give logits that are not numbers")
    return logits


def main(argv: list[str]) -> int:
    """Unpack the GGUF ``argv[0]`` into the folder ``argv[1]``; the exit code is that of the error."""
    # Whatever the libraries print to stdout goes to stderr: only our lines reach the parent.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**line: str) -> None:
        print(json.dumps(line), file=lines, flush=True)

    try:
        unpack(read_header(Path(argv[0])), Path(argv[1]), lambda step: tell(step=step))
    except ArteError as error:
        tell(error=error.message, hint=error.hint)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

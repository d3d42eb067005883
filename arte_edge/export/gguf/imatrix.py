"""Collect an importance matrix: which input columns of each weight matrix matter for *these* prompts.

Quantization rounds a weight with an error; the error's effect grows with the square of
the input it meets. The mean square of every input column, over the prompts that the
student was tailored to, tells the quantizer where to be exact. Prompts are run through
the checkpoint one by one in 32 bits, and the sums are kept on disk while it goes on, so
that a killed collection continues and ends with the same file.
"""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arte_edge.cache import Progress, sha256_checkpoint
from arte_edge.errors import InputError
from arte_edge.export.gguf.hooks import Sums, linear_names, watched
from arte_edge.export.gguf.imatrix_file import CHUNK_TOKENS, Imatrix, base_name, read_imatrix, write_imatrix
from arte_edge.extras import need
from arte_edge.store import content_key, write_atomic

__all__ = ["collect"]

_VERSION = 1  # raised when the same prompts would give other sums
_WINDOW_TOKENS = 2048  # a longer prompt is run in pieces: activations of one piece are in memory
_SAVE_EVERY_S = 10.0


def collect(
    checkpoint: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    dataset: str = "training prompts",
    progress: Progress | None = None,
) -> Path:
    """Write the importance matrix of the model in the folder `checkpoint` over `prompts` to `out`; return `out`.

    A finished `out` of the same checkpoint and prompts is left as it is; what a killed
    collection left beside it (``.NAME.state``) is gone on with.

    Args:
        prompts: rendered texts, special tokens included, as the model will meet them. Never the test split.
        dataset: what the file says it was made from; a path is cut to its last part.
        progress: told "importance matrix", prompts done, prompts in all.

    Raises:
        InputError: no prompts, or a checkpoint whose layers we cannot name.
        ArteError: a package is missing, activations are not finite, or the disk is full.
    """
    if not any(prompts):
        raise InputError(
            "An importance matrix needs prompts", "Give the texts that the student was trained on."
        )
    need("train", "Collecting an importance matrix")
    need("gguf", "Collecting an importance matrix")
    dataset = base_name(dataset)
    key = content_key("imatrix", _VERSION, sha256_checkpoint(checkpoint), dataset, list(prompts))
    if _is_finished(out, key):
        return out
    state = out.with_name(f".{out.name}.state")
    sums, n_prompt, n_token = _loaded(state, key)
    if n_prompt < len(prompts):
        n_token = _run(checkpoint, prompts, state, key, sums, n_prompt, n_token, progress)
    counts = {name: np.array([n_token], dtype=np.float32) for name in sums}
    rows = {name: values.astype(np.float32)[None, :] for name, values in sums.items()}
    write_imatrix(Imatrix(rows, counts, (dataset,), max(n_token // CHUNK_TOKENS, 1), key), out)
    state.unlink(missing_ok=True)
    return out


def _run(
    checkpoint: Path,
    prompts: Sequence[str],
    state: Path,
    key: str,
    sums: Sums,
    n_prompt: int,
    n_token: int,
    progress: Progress | None,
) -> int:
    """Add the prompts from number `n_prompt` on to `sums`, saving now and then; return the tokens in all."""
    import torch

    model, text = _load(checkpoint)
    names = linear_names(model, checkpoint)
    saved = time.monotonic()
    with torch.inference_mode(), watched(model, names, sums):
        for number, prompt in enumerate(prompts[n_prompt:], n_prompt + 1):
            ids = text.tokens(prompt)
            for start in range(0, len(ids), _WINDOW_TOKENS):
                # The output matrix is not watched, and its logits would be the largest thing in memory.
                model.base_model(torch.tensor([ids[start : start + _WINDOW_TOKENS]]), use_cache=False)
            n_token += len(ids)
            if progress:
                progress("importance matrix", number, len(prompts))
            if time.monotonic() - saved >= _SAVE_EVERY_S:
                _save(state, key, sums, number, n_token)
                saved = time.monotonic()
    return n_token


def _load(checkpoint: Path) -> tuple[Any, Any]:
    """Return the model in 32 bits and its `Text`.

    Raises:
        InputError: transformers cannot load the folder without running its code.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    from arte_edge.runtimes.transformers.tokenizer import Text

    logging.disable_progress_bar()  # the command shows progress of its own
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"{checkpoint}: cannot be loaded: {str(error).strip().splitlines()[0][:200]}",
            "Give a whole transformers checkpoint with its tokenizer.",
        ) from error
    return model.eval(), Text(tokenizer, None)


def _is_finished(out: Path, key: str) -> bool:
    try:
        return out.is_file() and read_imatrix(out).key == key
    except InputError:
        return False


def _save(state: Path, key: str, sums: Sums, n_prompt: int, n_token: int) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, __key__=np.array(key), __done__=np.array([n_prompt, n_token]), **sums)  # type: ignore[arg-type]
    write_atomic(state, buffer.getvalue())


def _loaded(state: Path, key: str) -> tuple[Sums, int, int]:
    """Return sums, prompts and tokens of an unfinished collection, or of none where there is none to go on with."""
    try:
        with np.load(state, allow_pickle=False) as arrays:
            if str(arrays["__key__"]) != key:
                return {}, 0, 0
            n_prompt, n_token = map(int, arrays["__done__"])
            sums = {name: arrays[name] for name in arrays.files if not name.startswith("__")}
            return sums, n_prompt, n_token
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}, 0, 0

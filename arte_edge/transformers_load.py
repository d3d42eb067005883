"""Load a checkpoint folder in transformers, with a LoRA adapter beside its weights or merged into them.

Every part that needs torch loads through here, so that all read the same files (`model_folder.look`) and a checkpoint
is either loaded whole or rejected: transformers itself fills missing weights with random numbers and only warns.

Two things go wrong when an adapter is merged. PEFT ignores tensors of an adapter that the base has no place for. And a
tied matrix is embedding and output in one: an update of one of the two then changes both, or is added twice. So
the two are separated before merging and tied again if they are still equal after it.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.checkpoint import read_tensors
from arte_edge.errors import ArteError, InputError
from arte_edge.model_folder import ADAPTER_WEIGHTS as _WEIGHTS
from arte_edge.model_folder import chat_templates, look, read_adapter_config, tokenizer_files

if TYPE_CHECKING:
    import torch

# Of the adapter's effect, what rounding of the merged weights may lose; and the bits of the weights themselves
_MAX_LOST = {"float32": 0.02, "float16": 0.25, "bfloat16": 0.75}
_ROUNDING = {"float32": 1e-5, "float16": 8e-3, "bfloat16": 3e-2}
_MIN_TOP1 = 0.95  # rounding can flip a tie between two tokens, rarely more
_N_PROBE = 64
_COPY = re.compile(r"\.(modules_to_save|original_module)\.([\w-]+\.)?weight$")


@contextmanager
def _rejecting(what: str, hint: str) -> Iterator[None]:
    """Turn whatever transformers and PEFT raise for files that they cannot use into an `InputError`."""
    try:
        yield
    except (ArteError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {' '.join(str(error).split())[:300] or type(error).__name__}", hint) from error


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder, with its chat template and without a limit of length, or an `InputError`."""
    from transformers import AutoTokenizer

    hint = "Save the tokenizer beside the model: tokenizer.save_pretrained(…)."
    with _rejecting(f"{folder}: transformers cannot read its tokenizer", hint):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:  # settings of an earlier call, which tokenizer.json keeps
            backend.no_truncation()
            backend.no_padding()
        tokenizer.chat_template = chat_templates(tokenizer_files(folder)).get("default")
    return tokenizer


def load_model(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """Return the model of a folder, an `InputError` unless every weight is there and transformers knows the family."""
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()  # commands show progress of their own
    if look(folder).kind != "checkpoint":
        raise InputError(f"{folder}: no checkpoint here", "It has config.json and model.safetensors.")
    hint = "Give a whole checkpoint in safetensors, of a family that transformers itself knows."
    with _rejecting(f"{folder}: transformers cannot load this checkpoint", hint):
        options |= {"dtype": dtype, "local_files_only": True, "trust_remote_code": False}
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{folder}: {missing[0]} is missing in the weights", hint)
    return model


def import_peft() -> None:
    """Import PEFT; what is in `sys.modules` afterwards needs no network.

    It imports bitsandbytes where that is installed, which on a processor that multiplies bfloat16 fetches compiled code
    from the Hub if the package ``kernels`` is installed, and otherwise prints that it cannot.
    """
    from transformers import utils

    # It remembers what it finds first: before the name is blocked.
    getattr(utils, "is_kernels_available", lambda: False)()
    log, kernels = logging.getLogger("bitsandbytes.backends.cpu.ops"), sys.modules.pop("kernels", None)
    level = log.level
    log.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # an import of it then fails
    try:
        importlib.import_module("peft")
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def attach_adapter(model: Any, folder: Path) -> Any:
    """Return `model` with the LoRA adapter in `folder` beside its weights and a vocabulary of the size in training.

    Raises InputError: no LoRA adapter, or one that does not fit the model in every tensor.
    """
    import_peft()
    from peft import PeftConfig, PeftModel

    read_adapter_config(folder)
    hint = "Name the model that it was trained on with --base."
    with _rejecting(f"{folder}: does not fit its base", hint), warnings.catch_warnings():
        # What peft uses of transformers is no user's business.
        warnings.simplefilter("ignore", FutureWarning)
        _resize(model, folder)
        live = PeftModel(model, PeftConfig.from_pretrained(str(folder)))
        loaded = live.load_adapter(str(folder), "default")
    # PEFT saves a trained matrix under several names if the vocabulary was resized.
    if odd := [key for key in sorted(loaded.unexpected_keys) if not _COPY.search(key)]:
        raise InputError(f"{folder}: does not fit its base, which has no place for {odd[0]}", hint)
    if odd := sorted(loaded.missing_keys):
        raise InputError(f"{folder}: {odd[0]} is missing, though its configuration names it", "Save it again.")
    return live.eval()


def _resize(model: Any, folder: Path) -> None:
    """Give the vocabulary of `model` the size of the matrices in an adapter that was trained with added tokens."""
    shapes = {name: tensor.shape for name, tensor in read_tensors(folder / _WEIGHTS).items()}
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    names = [f"base_model.model.{name}" for name, m in model.named_modules() if any(m is end for end in ends)]
    whole = [shapes.get(f"{n}.weight") or shapes.get(f"{n}.base_layer.weight") for n in names]
    n_row, rows = ends[0].weight.shape[0], {shape[0] for shape in whole if shape}
    if rows <= {n_row}:
        return
    if len(rows) > 1 or (None in whole and ends[-1].weight is not ends[0].weight):
        what = f"{folder}: was trained with {max(rows)} tokens, its base has {n_row}, and some rows are missing"
        raise InputError(what, "Save the adapter with save_embedding_layers=True.")
    model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def merge_attached(live: Any) -> Any:
    """Return the model with the adapter of `attach_adapter` merged, an `InputError` if a part of it has no place."""
    import torch

    base = live.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    first, last = (_innermost(end) for end in ends)
    tied = last is not None and first.weight is last.weight
    if tied:
        last.weight = torch.nn.Parameter(first.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
    with _rejecting("The adapter cannot be merged", "Train it without this part, or merge it where it was trained."):
        merged = live.merge_and_unload(safe_merge=True)
    first, last = merged.get_input_embeddings(), merged.get_output_embeddings()
    if tied and torch.equal(first.weight, last.weight):
        last.weight = first.weight
        merged.config.tie_word_embeddings = True
    return merged


def _innermost(module: Any) -> Any:
    """Return the layer that PEFT's layers are wrapped around."""
    inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
    return module if inner is None else _innermost(inner)


@dataclass(frozen=True)
class MergeCheck:
    """How far merged weights are from base plus adapter, in logits."""

    max_abs_diff: float
    mean_abs_diff: float
    update_mean_abs: float  # mean change of the base's logits by the adapter
    top1_agreement: float  # share of positions with the same most likely token
    tokens: int


def compare_merge(name: str, before: torch.Tensor, wanted: torch.Tensor, got: torch.Tensor, dtype: str) -> MergeCheck:
    """Compare logits ``[n_token, n_vocab]`` of the base, of base plus adapter, and of merged weights in `dtype`.

    Raises ArteError: more of the adapter's effect is lost than by rounding.
    """
    import torch

    diff, n_vocab = (got - wanted).abs(), min(before.shape[-1], wanted.shape[-1])
    check = MergeCheck(
        max_abs_diff=float(diff.max()),
        mean_abs_diff=float(diff.mean()),
        update_mean_abs=float((before[:, :n_vocab] - wanted[:, :n_vocab]).abs().mean()),
        top1_agreement=float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
        tokens=len(got),
    )
    limit = _MAX_LOST[dtype] * check.update_mean_abs + _ROUNDING[dtype] * float(wanted.abs().mean())
    if not check.mean_abs_diff <= limit or not torch.isfinite(diff).all() or check.top1_agreement < _MIN_TOP1:
        raise ArteError(
            f"{name}: not the same model as its base with the adapter: logits are off by {check.mean_abs_diff:.3g}, "
            f"the adapter's effect is {check.update_mean_abs:.3g}; {check.top1_agreement:.1%} of first choices agree",
            "Set dtype to float16, train for longer, or train all weights.",
        )
    return check


def logits_of(model: Any, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the float32 logits ``[n_token, n_vocab]`` of token lists, one after another."""
    import torch

    model.eval()
    with torch.inference_mode():
        batches = [torch.tensor([list(ids)], device=model.device) for ids in texts]
        return torch.cat([model(ids).logits[0].float().cpu() for ids in batches])


def probe_ids(model: Any) -> list[int]:
    """Return tokens from all over a model's vocabulary, so that changed rows of its embedding show."""
    n_row = model.get_input_embeddings().weight.shape[0]
    return [i * (n_row - 1) // (_N_PROBE - 1) for i in range(_N_PROBE)]

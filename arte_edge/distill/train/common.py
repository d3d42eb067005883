"""What both trainers share: settings, the model and its tokenizer, token ids, the order of examples, TRL.

Training sees the very token ids that an engine decodes. A prompt is tokenized alone, as an engine does
it, with exactly one begin token where the model needs one (a rendered chat template may contain it
already). The completion's ids follow it. Tokenizing both as one text could merge a token across the
boundary, and the model would learn to continue a prompt that it never gets.

The order of examples is decided once, for all epochs. So a resumed training sees exactly the examples
that were left (a length-grouping sampler would shuffle again), and examples of similar length share a
batch, which on a CPU saves the time that padding costs.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from arte_edge.device.model_size import ModelSize
from arte_edge.distill.memory_plan import computes_twice, keeps_16_bits
from arte_edge.distill.train.checkpoints import Workspace
from arte_edge.distill.train.ranks import agreed, is_main, is_sharded, shared_batch, world_size
from arte_edge.errors import InputError
from arte_edge.extras import need
from arte_edge.frozen_weights import load_frozen
from arte_edge.runtimes.transformers.placement import empty_cache, pick_device, training_floats
from arte_edge.runtimes.transformers.tokenizer import Text
from arte_edge.transformers_load import import_peft, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

Progress = Callable[[int, int], None]  # optimizer steps done, of how many

# A layer's weights are gathered while it computes, and it computes twice rather than keep its activations: a model that
# no GPU holds. Checkpoints hold the adapter whole.
_CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
_SHARDED: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"},
    # Not FSDP's own checkpointing, which renames the layers, in an adapter's file too.
    **_CHECKPOINTING,
}
# Parameters of mallopt(3), from malloc.h. Setting any of them ends for good glibc's adaptation of two thresholds to the
# sizes of freed blocks: afterwards these two are what it reaches once a block of 32 MiB was freed, the others defaults.
_MALLOC_TRAINING = {
    -4: 0,  # M_MMAP_MAX: no block gets a mapping of its own
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD
    -2: 64 * 1024**2,  # M_TOP_PAD
}
_MALLOC_AFTER = {-3: 32 * 1024**2, -1: 64 * 1024**2, -4: 65_536, -2: 128 * 1024}  # -3: M_MMAP_THRESHOLD
_WINDOW = 8  # batches that are sorted by length together: the order stays random


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lora(_Settings):
    """A LoRA adapter: its layers and size."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0, description="the update is scaled by alpha / rank")
    targets: tuple[str, ...] = Field(default=(), description="layer names; empty: every linear layer")


class _Training(_Settings):
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=1, description="examples (SFT) or pairs (DPO) in one forward pass")
    accumulate: int = Field(default=1, ge=1, description="forward passes to one optimizer step")
    epochs: float = Field(default=1.0, gt=0)
    warmup: float = Field(ge=0, le=1, description="share of the steps with a rising learning rate")
    max_length: int = Field(default=1024, ge=8, description="tokens; a longer example is dropped and counted")
    seed: int = Field(default=0, ge=0)
    save_every_s: float = Field(default=120.0, ge=0, description="at most so many seconds of work are lost by a kill")


class SftSettings(_Training):
    """Supervised fine-tuning; the paper: 2e-5, one epoch, 3 % warm-up, linear decay."""

    learning_rate: float = Field(default=2e-5, gt=0, description="for LoRA ten times as much")
    batch_size: int = Field(default=8, ge=1)
    warmup: float = Field(default=0.03, ge=0, le=1)
    lora: Lora | None = Field(default=None, description="None: all weights are trained")
    dtype: Literal["auto", "bfloat16", "float16"] = Field(
        default="auto", description="of the written checkpoint; auto: float16, for Gemma bfloat16"
    )


class CollapseLimits(_Settings):
    """When an aligned teacher counts as collapsed, each limit relative to the start of the run."""

    min_valid: float = Field(default=0.5, ge=0, le=1, description="share of the first valid-draft rate")
    length_factor: float = Field(default=2.0, gt=1, description="mean length may change by this factor")
    max_chosen_drop_nats: float = Field(
        default=20.0, gt=0, description="fall of a chosen completion's log-probability, mean of recent steps"
    )


class DpoSettings(_Training):
    """Direct preference optimization with LoRA; the defaults work for a small teacher."""

    learning_rate: float = Field(default=5e-6, gt=0, description="the paper: 1e-7, all weights")
    batch_size: int = Field(default=2, ge=1)
    accumulate: int = Field(default=2, ge=1)
    warmup: float = Field(default=0.1, ge=0, le=1)
    beta: float = Field(default=0.1, gt=0, description="strength of the KL penalty")
    ld_alpha: float = Field(default=1.0, ge=0, le=1, description="weight of the longer side's last tokens")
    target_kl: float = Field(
        default=0.0, ge=0, description="nats a token that set the rate (`kl_target`); 0: fixed rate"
    )
    max_length: int = Field(default=0, ge=0, description="tokens of a pair; 0: what the model can read")
    losses: tuple[Literal["sigmoid", "sft", "ipo", "hinge"], ...] = Field(
        default=("sigmoid", "sft"), min_length=1, description='the paper: ["sigmoid"]'
    )
    loss_weights: tuple[float, ...] = Field(default=(), description="one per loss; empty: 1.0 each")
    lora: Lora = Lora()
    weights: Literal["16-bit", "nf4"] = Field(default="16-bit", description="of the frozen base")
    probe_every: int = Field(default=4, ge=1, description="optimizer steps between two checks")
    limits: CollapseLimits = CollapseLimits()

    @model_validator(mode="after")
    def _one_weight_a_loss(self) -> DpoSettings:
        if self.loss_weights and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"loss_weights has {len(self.loss_weights)} values for {len(self.losses)} losses")
        return self


def free_memory() -> None:
    """Free the memory of a training: the next stage opens a model of the same size.

    A trainer and its callbacks reference each other, so the garbage collector has to run.
    """
    gc.collect()
    empty_cache(pick_device())


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc keep freed memory during a training on a CPU, instead of returning large blocks to the kernel.

    Every step frees its gradients and needs them again: clearing those pages anew is an eighth of a step of a 135M
    student. Not for alignments: the sizes of their blocks vary with the rows. `free_memory` returns all of it. A user's
    own settings of glibc, in the environment, stay.
    """
    own = any(re.fullmatch("GLIBC_TUNABLES|MALLOC_.*_", key) for key in os.environ)
    if sys.platform != "linux" or pick_device().type != "cpu" or own:
        yield
        return
    _set_malloc(_MALLOC_TRAINING)
    try:
        yield
    finally:
        _set_malloc(_MALLOC_AFTER)


def _set_malloc(values: Mapping[int, int]) -> None:
    with suppress(OSError, AttributeError):  # musl has no mallopt
        for parameter, value in values.items():
            ctypes.CDLL(None).mallopt(parameter, value)


@contextmanager
def quiet_training() -> Iterator[None]:
    """Switch telemetry off, and the progress bars of the libraries for as long as a training runs.

    Raises ArteError: the training libraries are not installed.
    """
    need("train", "Training")
    import_peft()
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
    from huggingface_hub import constants
    from transformers.utils import logging

    # TRL reports every trainer it makes to the Hub; its environment variable is only read at the first import.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    shown = logging.is_progress_bar_enabled(), is_progress_bar_enabled()
    logging.disable_progress_bar()
    disable_progress_bar()
    trainer = logging.get_logger("transformers.trainer")
    level = trainer.level
    # A resumed training warns of a missing lm_head, which is the embedding and no weight of its own.
    trainer.setLevel(logging.ERROR)
    try:
        # Deprecation notes to developers mean nothing to a user.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        trainer.setLevel(level)
        if shown[0]:
            logging.enable_progress_bar()
        if shown[1]:
            enable_progress_bar()


def load(checkpoint: Path, *, frozen: bool, four_bits: bool = False) -> tuple[Any, Any]:
    """Return the model and the tokenizer of a checkpoint folder.

    The weights are float32, so that small updates are not rounded away; a base that stays `frozen` under LoRA has 16
    bits where the device multiplies them, and on another processor keeps those of its files if memory is short
    (`frozen_weights`). With `four_bits` its linear layers have four: NF4 in blocks of 64 with quantized scales, as in
    QLoRA (arXiv 2305.14314).

    Raises InputError: no such checkpoint, or transformers cannot read it; ArteError: bitsandbytes is missing.
    """
    import torch

    floats = training_floats(checkpoint, frozen=True) if frozen else "float32"
    if four_bits:
        need("qlora", 'align.weights = "nf4"')
        from transformers import BitsAndBytesConfig

        dtype = getattr(torch, floats)
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        model = load_model(checkpoint, dtype, attn_implementation="sdpa", quantization_config=nf4)
        for layer in model.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                # Else the first evaluation repacks it for good, and no gradient passes it any more
                # (findings/bitsandbytes_evaluation_ends_the_gradient.sh).
                layer.support_avx512bf16_for_cpu = False
    elif (
        frozen
        and floats == "float32"
        and pick_device().type == "cpu"
        and not is_sharded()
        and keeps_16_bits(ModelSize.of(checkpoint).n_params)
    ):
        model = load_frozen(checkpoint, attn_implementation="sdpa")
    else:
        model = load_model(checkpoint, getattr(torch, floats), attn_implementation="sdpa")
    return model, load_tokenizer(checkpoint)


def lora_config(lora: Lora) -> Any:
    """Return PEFT's configuration of `lora`."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=list(lora.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )


def arguments(
    checkpoint: Path,
    workspace: Workspace,
    settings: SftSettings | DpoSettings,
    n_example: int,
    schedule: str,
    *,
    most: int,
    at_once: int,
    labelled: int,
) -> dict[str, Any]:
    """Return the arguments of TRL's configurations, for `n_example` examples in their final order.

    `most` is how many of them may be in one forward pass of one of several ranks, `at_once` the tokens of the longest
    pass, of which `labelled` have a loss: on a CPU they decide whether layers are computed twice (`memory_plan`).

    Raises InputError: a step's examples cannot be dealt out to the ranks.
    """
    device, floats, n_rank = pick_device(), training_floats(checkpoint), world_size()
    alone = (settings.batch_size, settings.accumulate)
    size, passes = alone if n_rank == 1 else shared_batch(*alone, n_rank, most)
    n_step = math.ceil(n_example / (settings.batch_size * settings.accumulate))
    twice = is_sharded()
    if device.type == "cpu" and not twice:
        lora = (settings.lora.rank, settings.lora.targets) if settings.lora else None
        pairs = isinstance(settings, DpoSettings)
        bfloat16 = training_floats(checkpoint, frozen=True) == "bfloat16"
        twice = computes_twice(ModelSize.of(checkpoint), at_once, labelled, lora, pairs, bfloat16)
    return {
        "output_dir": str(workspace.checkpoints),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": passes,
        "ddp_find_unused_parameters": False,
        **(_SHARDED if is_sharded() else _CHECKPOINTING if twice else {}),
        "num_train_epochs": 1,  # the order holds all epochs, see `order`
        "train_sampling_strategy": "sequential",
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": schedule,
        # Its first step has rate zero: the weights stay, Adam's averages begin.
        "warmup_steps": int(settings.warmup * n_step),
        "max_length": None,  # too long examples were dropped and counted, not truncated
        "seed": settings.seed,
        "bf16": floats == "bfloat16",
        "fp16": floats == "float16",
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "gradient_checkpointing": twice,  # costs a forward pass
        "logging_steps": 1,
        "save_strategy": "no",  # `keep_going` saves checkpoints by the clock
        "save_total_limit": 2,  # the older one goes only when the newer one is whole
        "report_to": "none",
        "disable_tqdm": True,
    }


def keep_going(workspace: Workspace, save_every_s: float, progress: Progress | None) -> TrainerCallback:
    """Return a callback that saves checkpoints by the clock, marks the whole ones and reports progress."""
    from transformers import TrainerCallback

    class KeepGoing(TrainerCallback):  # type: ignore[misc]
        saved = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if progress is not None:
                progress(state.global_step, state.max_steps)
            due = agreed(time.monotonic() - self.saved >= save_every_s)
            if due and state.global_step < state.max_steps:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if is_main():
                workspace.mark(state.global_step)
            self.saved = time.monotonic()

    return KeepGoing()


def main_rank_saves(trainer: Trainer) -> None:
    """Let rank 0 alone write checkpoints: of the others there is nothing to keep, for no step draws random numbers."""
    if not is_main():
        trainer._save_rng_state = lambda output_dir: None


def history_of(trainer: Trainer) -> list[dict[str, float]]:
    """Return one row a step: loss, learning rate, and what TRL measures beside them."""
    rows: list[Mapping[str, float]] = trainer.state.log_history
    return [dict(row) for row in rows if "loss" in row]


@dataclass(frozen=True)
class Encoder:
    """A transformers tokenizer, used as the engines use it."""

    tokenizer: Any

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a rendered prompt."""
        return Text(self.tokenizer, None).tokens(text)

    def completion(self, prompt: str, text: str) -> list[int]:
        """Return the ids that write `text` after `prompt`, closed by the end token.

        Raises InputError: the tokenizer has no end token.
        """
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise InputError("The model's tokenizer has no end token", "Set eos_token in tokenizer_config.json.")
        start, whole = self.prompt(prompt), self.prompt(prompt + text)
        seam_holds = whole[: len(start)] == start
        ids: list[int] = whole[len(start) :] if seam_holds else self._plain(text)
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def check_rows(rows: Sequence[Mapping[str, str]], keys: Sequence[str], what: str) -> None:
    """Raise unless every row has exactly the texts `keys`, none of them empty.

    Raises InputError: names the first row that is wrong, counted from 1.
    """
    if not rows:
        raise InputError(f"There is no {what} to train on", "The stage before this one produced no rows.")
    for number, row in enumerate(rows, start=1):
        missing = [key for key in keys if not isinstance(row.get(key), str) or not row[key]]
        if missing or set(row) != set(keys):
            named = missing[0] if missing else sorted(set(row) - set(keys))[0]
            raise InputError(f"{what} {number}: '{named}' is missing, empty or unknown", f"Keys: {', '.join(keys)}.")


def examples_seen(n_example: int, epochs: float) -> int:
    """Return how many examples all epochs see together."""
    return max(1, round(n_example * epochs))


def training_order(lengths: Sequence[int], batch_size: int, epochs: float, seed: int) -> list[int]:
    """Return positions in `lengths` in the order of training, `examples_seen` of them.

    `lengths` are in tokens. An example is seen at most once more often than another.
    """
    rng = random.Random(seed)
    n = examples_seen(len(lengths), epochs)
    order: list[int] = []
    while len(order) < n:
        epoch = list(range(len(lengths)))
        rng.shuffle(epoch)
        order += epoch
    return _grouped(order[:n], lengths, batch_size, rng)


def _grouped(order: list[int], lengths: Sequence[int], batch_size: int, rng: random.Random) -> list[int]:
    """Return `order` with batches of like length; a batch that is not full stays last."""
    grouped: list[int] = []
    for start in range(0, len(order), batch_size * _WINDOW):
        window = sorted(order[start : start + batch_size * _WINDOW], key=lambda i: lengths[i])
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        last = [batches.pop()] if len(batches[-1]) < batch_size else []
        rng.shuffle(batches)
        grouped += [i for batch in batches + last for i in batch]
    return grouped

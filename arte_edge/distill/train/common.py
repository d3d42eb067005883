"""What both trainers share: the model and its tokenizer, the arguments, a quiet and silent TRL.

TRL reports every trainer it makes to the Hub. Nothing leaves the machine here unless
a flag says so, so that is switched off in the library itself: its environment
variable is only read when the Hub's client is first imported.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.distill.train.settings import DpoSettings, Lora, SftSettings
from arte_edge.distill.train.workspace import Workspace
from arte_edge.errors import InputError
from arte_edge.extras import need

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

__all__ = [
    "Progress",
    "arguments",
    "free_memory",
    "history_of",
    "keep_going",
    "load",
    "lora_config",
    "on_cuda",
    "quiet_training",
]

Progress = Callable[[int, int], None]  # optimizer steps done, of how many


def free_memory() -> None:
    """Give back what a training held. The next stage opens a model of the same size beside it.

    A trainer and its callbacks point at each other, so the collector has to be asked; and glibc
    keeps what was freed until it is told to let go.
    """
    import torch

    gc.collect()
    if on_cuda():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def on_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


@contextmanager
def quiet_training() -> Iterator[None]:
    """Switch telemetry off, and the progress bars of the libraries for as long as a training runs.

    Raises:
        ArteError: the training libraries are not installed.
    """
    need("train", "Training")
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
    from huggingface_hub import constants
    from transformers.utils import logging

    constants.HF_HUB_DISABLE_TELEMETRY = True
    shown = logging.is_progress_bar_enabled(), is_progress_bar_enabled()
    logging.disable_progress_bar()
    disable_progress_bar()
    try:
        # A library's word to its developers about a name it will rename means nothing to a user.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown[0]:
            logging.enable_progress_bar()
        if shown[1]:
            enable_progress_bar()


def load(checkpoint: Path, *, frozen: bool) -> tuple[Any, Any]:
    """Return the model and the tokenizer of a checkpoint folder.

    The weights are float32, so that small updates are not rounded away; a base that
    stays `frozen` under LoRA is bfloat16 on a GPU, where that halves the memory.

    Raises:
        InputError: no such checkpoint, or transformers cannot read it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if frozen and on_cuda() else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint}: transformers cannot read this checkpoint: {error}") from error
    return model, tokenizer


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
    workspace: Workspace, settings: SftSettings | DpoSettings, n_example: int, schedule: str
) -> dict[str, Any]:
    """Return the arguments of TRL's configurations, for `n_example` examples in their final order."""
    cuda = on_cuda()
    n_step = math.ceil(n_example / (settings.batch_size * settings.accumulate))
    return {
        "output_dir": str(workspace.checkpoints),
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "num_train_epochs": 1,  # the order holds all epochs, see `order`
        "train_sampling_strategy": "sequential",
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": schedule,
        # Rounded down: a warm-up of one step would be one step at rate zero.
        "warmup_steps": int(settings.warmup * n_step),
        "max_length": None,  # what is too long was dropped, with a count, not cut
        "seed": settings.seed,
        "bf16": cuda,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "gradient_checkpointing": False,  # costs a forward pass; the models are small
        "logging_steps": 1,
        "save_strategy": "no",  # `keep_going` asks for checkpoints by the clock
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
            due = time.monotonic() - self.saved >= save_every_s
            if due and state.global_step < state.max_steps:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            workspace.mark(state.global_step)
            self.saved = time.monotonic()

    return KeepGoing()


def history_of(trainer: Trainer) -> list[dict[str, float]]:
    """Return one row a step: loss, learning rate, and what TRL measures beside them."""
    rows: list[Mapping[str, float]] = trainer.state.log_history
    return [dict(row) for row in rows if "loss" in row]

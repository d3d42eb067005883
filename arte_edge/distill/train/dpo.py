"""Align the teacher with the student's preferences: DPO with LoRA, with checks for model collapse.

The reference model is the teacher without its adapter, so one copy of the weights
serves both. TRL's trainer gets token ids that are made here, as the engines make
them, and TRL's metrics are checked by `collapse`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.cache import sha256_checkpoint
from arte_edge.distill.train.checkpoints import Workspace, finished
from arte_edge.distill.train.collapse import CollapseMonitor, Probe, copy_adapter
from arte_edge.distill.train.common import (
    DpoSettings,
    Encoder,
    Progress,
    arguments,
    check_rows,
    free_memory,
    history_of,
    keep_going,
    load,
    lora_config,
    quiet_training,
    training_order,
)
from arte_edge.distill.train.completion_head import score_completions_only
from arte_edge.errors import ArteError, InputError
from arte_edge.private_apis import missing
from arte_edge.store import content_key, write_jsonl

__all__ = ["DpoResult", "encode_pairs", "train_dpo"]


@dataclass(frozen=True)
class DpoResult:
    """An adapter that aligns the teacher."""

    adapter: Path  # a PEFT folder
    steps: int  # optimizer steps taken
    kept_step: int  # the step whose adapter this is; 0: the unchanged teacher
    collapse: str  # why training was stopped early; empty if it was not
    pairs: int  # pairs that were trained on
    dropped: int  # pairs longer than max_length
    seconds: float
    history: tuple[dict[str, float], ...]  # a row a step: loss, logps/chosen, rewards/margins, …
    probes: tuple[
        dict[str, Any], ...
    ]  # a row per check: step, valid_rate, mean_tokens, chosen_drop_nats, reason


def train_dpo(
    checkpoint: Path,
    pairs: Sequence[Mapping[str, str]],
    out: Path,
    settings: DpoSettings | None = None,
    *,
    probe: Probe | None = None,
    progress: Progress | None = None,
) -> DpoResult:
    """Align `checkpoint` on `pairs` (rendered ``prompt``, ``chosen``, ``rejected``) into the folder `out`.

    `probe` runs before the first step, every ``settings.probe_every`` steps and after the last
    one; on a collapse training stops and the last good adapter is used. Killed at any moment, the
    same call resumes from its last checkpoint to the same adapter; a finished one returns at once.

    Raises:
        InputError: no pairs, a pair without its texts, no pair that fits, an unreadable checkpoint,
            or an `out` that holds something else.
        ArteError: the training libraries are missing.
    """
    settings = settings or DpoSettings()
    check_rows(pairs, ("prompt", "chosen", "rejected"), "preference pair")
    sha256 = sha256_checkpoint(checkpoint)
    request = content_key("dpo", sha256, [dict(row) for row in pairs], settings.model_dump())
    if done := finished(out, request, _result):
        return done
    began = time.monotonic()
    workspace = Workspace(out, request)
    monitor = CollapseMonitor(workspace, settings, probe)
    with quiet_training():
        trainer, counts = _trainer(checkpoint, pairs, settings, workspace, monitor, progress)
        _run(trainer, workspace, monitor)
        history, steps = history_of(trainer), trainer.state.global_step
        del trainer
        free_memory()
    staged = copy_adapter(monitor.adapter(monitor.good_step), workspace.folder / "result")
    write_jsonl(staged / "log.jsonl", [*history, *({"probe": check} for check in monitor.checks)])
    report = {
        "steps": steps,
        "kept_step": monitor.good_step,
        "collapse": monitor.reason,
        **counts,
        "seconds": round(time.monotonic() - began, 3),
        "history": history,
        "probes": monitor.checks,
    }
    workspace.finish(staged, report)
    return _result(out, report)


def encode_pairs(
    encoder: Encoder, pairs: Sequence[Mapping[str, str]], max_length: int
) -> list[dict[str, list[int]]]:
    """Return ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` of each pair of which both texts fit."""
    encoded = []
    for pair in pairs:
        prompt = encoder.prompt(pair["prompt"])
        chosen, rejected = (encoder.completion(pair["prompt"], pair[key]) for key in ("chosen", "rejected"))
        if len(prompt) + max(len(chosen), len(rejected)) <= max_length:
            encoded.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return encoded


def _trainer(
    checkpoint: Path,
    pairs: Sequence[Mapping[str, str]],
    settings: DpoSettings,
    workspace: Workspace,
    monitor: CollapseMonitor,
    progress: Progress | None,
) -> tuple[Any, dict[str, int]]:
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    if moved := missing(__name__):
        raise ArteError(
            f"This version of TRL cannot train on token ids: {moved[0]}",
            "Install a version that is known to work: pip install 'arte-edge[train]'.",
        )

    class TokenisedDPOTrainer(DPOTrainer):  # type: ignore[misc]
        """DPO on token ids: TRL's own tokenization doubles begin tokens and merges across the seam."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    model, tokenizer = load(checkpoint, frozen=True)
    encoded = encode_pairs(Encoder(tokenizer), pairs, settings.max_length)
    if not encoded:
        raise InputError(
            f"No preference pair fits into {settings.max_length} tokens", "Raise max_length or shorten them."
        )
    lengths = [sum(len(ids) for ids in pair.values()) for pair in encoded]
    order = training_order(lengths, settings.batch_size, settings.epochs, settings.seed)
    trainer = TokenisedDPOTrainer(
        model=model,
        args=DPOConfig(
            beta=settings.beta,
            loss_type=list(settings.losses),
            loss_weights=list(settings.loss_weights) or None,
            **arguments(checkpoint, workspace, settings, len(order), "cosine"),
        ),
        train_dataset=Dataset.from_list([encoded[i] for i in order]),
        processing_class=tokenizer,
        peft_config=lora_config(settings.lora),
        callbacks=[keep_going(workspace, settings.save_every_s, progress), monitor.callback()],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for data
    score_completions_only(trainer.model.get_base_model(), pairs=True)
    return trainer, {"pairs": len(encoded), "dropped": len(pairs) - len(encoded)}


def _run(trainer: Any, workspace: Workspace, monitor: CollapseMonitor) -> None:
    """Train from the last checkpoint, after the check that a kill may have prevented."""
    from transformers import TrainerState

    last = workspace.last_checkpoint()
    if last is None:
        monitor.forget_after(0)
        trainer.model.save_pretrained(workspace.folder / "start")
        monitor.check(0, workspace.folder / "start", [])
        trainer.train()
        return
    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    monitor.forget_after(state.global_step)
    monitor.check_if_due(state, last)
    if monitor.reason:
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=str(last))


def _result(out: Path, report: Mapping[str, Any]) -> DpoResult:
    lists = {"history": tuple(report["history"]), "probes": tuple(report["probes"])}
    return DpoResult(**{**report, **lists, "adapter": out})

"""Align the teacher with the student's preferences: DPO with LoRA, with checks for model collapse.

The reference model is the teacher without its adapter, so one copy of the weights serves both. TRL's trainer gets token
ids that are made here, as the engines make them, and TRL's metrics are checked by `collapse`. With ``target_kl`` the
rate follows from how far the teacher has moved (`kl_target`).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arte_edge.cache import sha256_checkpoint
from arte_edge.distill.train.checkpoints import Workspace, finished
from arte_edge.distill.train.collapse import CollapseMonitor, Probe, ProbeResult, copy_adapter
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
    main_rank_saves,
    quiet_training,
    training_order,
)
from arte_edge.distill.train.completion_head import score_completions_only
from arte_edge.distill.train.kl_target import FEWEST_STEPS, HeldOut, StepSizer, held_out_report
from arte_edge.distill.train.ranks import is_main, is_sharded, slot_weights, train_on_ranks, world_size
from arte_edge.errors import ArteError, InputError
from arte_edge.frozen_weights import FilePages
from arte_edge.private_apis import missing
from arte_edge.store import content_key, write_jsonl

_MOST_WATCHED = 4  # pairs that are measured after a step: a quarter of its work


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
    held_out: HeldOut
    history: tuple[dict[str, float], ...]  # a row a step: loss, logps/chosen, rewards/margins, …
    probes: tuple[dict[str, Any], ...]  # a row per check: step, valid_rate, mean_tokens, chosen_drop_nats, reason


def train_dpo(
    checkpoint: Path,
    pairs: Sequence[Mapping[str, str]],
    out: Path,
    settings: DpoSettings | None = None,
    *,
    held_out: Sequence[Mapping[str, str]] = (),
    probe: Probe | None = None,
    progress: Progress | None = None,
    processes: int = 1,
    sharded: bool = False,
) -> DpoResult:
    """Align `checkpoint` on `pairs` (rendered ``prompt``, ``chosen``, ``rejected``) into the folder `out`.

    How far the teacher has moved, and what it has learned, is measured on the pairs `held_out`; without any, how far
    on `pairs`.

    `probe` runs before the first step, every ``settings.probe_every`` steps and after the last one; on a collapse
    training stops and the last good adapter is used. Killed at any moment, the same call resumes from its last
    checkpoint to the same adapter; a finished one returns at once. With several `processes` each has a share of every
    step's pairs (`ranks`) and, `sharded`, of the weights; `probe` runs in this one.

    Raises:
        InputError: no pairs, a pair without its texts, no pair that fits, an unreadable checkpoint,
            or an `out` that holds something else.
        ArteError: the training libraries are missing.
    """
    settings = settings or DpoSettings()
    check_rows(pairs, ("prompt", "chosen", "rejected"), "preference pair")
    sha256 = sha256_checkpoint(checkpoint)
    texts = [[dict(row) for row in rows] for rows in (pairs, held_out)]
    # An alignment that an earlier version began, which knew 16 bits alone, resumes.
    made = settings.model_dump(exclude={"weights"} if settings.weights == "16-bit" else None)
    request = content_key("dpo", sha256, texts, made)
    if done := finished(out, request, _result):
        return done
    workspace = Workspace(out, request)
    if processes > 1:
        job: dict[str, Any] = {"checkpoint": str(checkpoint), "pairs": texts[0], "held_out": texts[1]}
        job |= {"settings": settings.model_dump(mode="json"), "probed": probe is not None, "sharded": sharded}
        checked = None if probe is None else lambda folder: asdict(probe(folder))
        train_on_ranks("dpo", job, workspace, processes, progress, checked)
    else:
        train_here(checkpoint, pairs, held_out, settings, workspace, probe, progress)
    done = finished(out, request, _result)
    assert done is not None
    return done


def train_here(
    checkpoint: Path,
    pairs: Sequence[Mapping[str, str]],
    held_out: Sequence[Mapping[str, str]],
    settings: DpoSettings,
    workspace: Workspace,
    probe: Probe | None,
    progress: Progress | None,
) -> None:
    """Train in this process, which may be one of several ranks; rank 0 writes the result to its place."""
    began = time.monotonic()
    with quiet_training():
        training = _Training(checkpoint, pairs, held_out, settings, workspace, probe, progress)
        training.run()
        if not is_main() and not is_sharded():
            return
        monitor, sizer, state = training.monitor, training.sizer, training.trainer.state
        found = training.judged(monitor.adapter(monitor.good_step))
        if not is_main():
            return
        history, steps = history_of(training.trainer), state.global_step
        counts = {"pairs": training.n_pair, "dropped": len(pairs) - training.n_pair}
        del training, state
        free_memory()
    measured = sizer.rates()
    for row in history:
        if (at := measured.get(int(row.get("step", 0)))) is not None:
            row |= {"learning_rate": at["rate"], "kl": at["kl"]}  # the schedule's own figure is the first rate
    staged = copy_adapter(monitor.adapter(monitor.good_step), workspace.folder / "result")
    write_jsonl(staged / "log.jsonl", [*history, *({"probe": check} for check in monitor.checks)])
    report = {
        "steps": steps,
        "kept_step": monitor.good_step,
        "collapse": monitor.reason,
        **counts,
        "seconds": round(time.monotonic() - began, 3),
        "held_out": asdict(found),
        "history": history,
        "probes": monitor.checks,
    }
    workspace.finish(staged, report)


def least_epochs(settings: DpoSettings, n_pair: int) -> float:
    """Return the epochs of a training on `n_pair` pairs: more than set where `target_kl` needs more steps."""
    if not settings.target_kl:
        return settings.epochs
    return max(settings.epochs, FEWEST_STEPS * settings.batch_size * settings.accumulate / max(n_pair, 1))


def encode_pairs(encoder: Encoder, pairs: Sequence[Mapping[str, str]], max_length: int) -> list[dict[str, list[int]]]:
    """Return ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` of each pair of which both texts fit."""
    encoded = []
    for pair in pairs:
        prompt = encoder.prompt(pair["prompt"])
        chosen, rejected = (encoder.completion(pair["prompt"], pair[key]) for key in ("chosen", "rejected"))
        if len(prompt) + max(len(chosen), len(rejected)) <= max_length:
            encoded.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return encoded


class _Training:
    """TRL's trainer, with what watches it."""

    def __init__(
        self,
        checkpoint: Path,
        pairs: Sequence[Mapping[str, str]],
        held_out: Sequence[Mapping[str, str]],
        settings: DpoSettings,
        workspace: Workspace,
        probe: Probe | None,
        progress: Progress | None,
    ) -> None:
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

            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                weight = inputs.pop("weight", None)
                loss = super().compute_loss(model, inputs, *args, **kwargs)
                return loss if weight is None else loss * weight.mean()

        model, tokenizer = load(checkpoint, frozen=True, four_bits=settings.weights == "nf4")
        limit = settings.max_length or getattr(model.config, "max_position_embeddings", None) or 2**20
        encoded = encode_pairs(Encoder(tokenizer), pairs, limit)
        if not encoded:
            raise InputError(
                f"No preference pair fits into {limit} tokens", "Raise align.max_length, or shorten the drafts."
            )
        self._settings, self._workspace, self.n_pair = settings, workspace, len(encoded)
        self._held_out = encode_pairs(Encoder(tokenizer), held_out, limit)
        n_watched = min(max(settings.batch_size * settings.accumulate, 2), _MOST_WATCHED)
        watched = (self._held_out or encoded)[:n_watched]
        self.sizer = StepSizer(workspace, watched, settings.learning_rate, settings.target_kl)
        sizer = self.sizer  # not `self`: the monitor outlives the trainer, whose memory has to be free by then
        probe = probe and _with_room(probe, model)
        self.monitor = CollapseMonitor(workspace, settings, probe, ended=lambda: sizer.reached)
        lengths = [sum(len(ids) for ids in pair.values()) for pair in encoded]
        epochs = least_epochs(settings, len(encoded))
        order = training_order(lengths, settings.batch_size, epochs, settings.seed)
        schedule = "constant" if settings.target_kl else "cosine"
        watchers = [self.sizer.callback()] if settings.target_kl else []
        examples: list[dict[str, Any]] = [encoded[i] for i in order]
        if world_size() > 1:
            weights = slot_weights(len(order), settings.batch_size, settings.accumulate, world_size())
            examples += examples[-1:] * (len(weights) - len(order))
            examples = [{**row, "weight": weight} for row, weight in zip(examples, weights, strict=True)]
        sides = [len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in encoded]
        longest = {"at_once": settings.batch_size * max(lengths), "labelled": settings.batch_size * max(sides)}
        self.trainer = TokenisedDPOTrainer(
            model=model,
            args=DPOConfig(
                beta=settings.beta,
                ld_alpha=settings.ld_alpha if settings.ld_alpha < 1 else None,
                loss_type=list(settings.losses),
                loss_weights=list(settings.loss_weights) or None,
                remove_unused_columns=world_size() == 1,
                **arguments(checkpoint, workspace, settings, len(order), schedule, most=1, **longest),
            ),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            peft_config=lora_config(settings.lora),
            callbacks=[keep_going(workspace, settings.save_every_s, progress), *watchers, self.monitor.callback()],
        )
        self.trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for data
        main_rank_saves(self.trainer)
        if world_size() > 1:
            self.trainer.data_collator = _with_weight(self.trainer.data_collator)
        score_completions_only(self.trainer.model.get_base_model(), pairs=True)

    def run(self) -> None:
        """Train from the last checkpoint, after the check that a kill may have prevented."""
        from transformers import TrainerState

        last = self._workspace.last_checkpoint()
        if last is None:
            self.monitor.forget_after(0)
            self.sizer.forget_after(0)
            start = self._workspace.folder / "start"
            if is_main():
                self.trainer.model.save_pretrained(start)
            self.monitor.check(0, start, [])
            self.trainer.train()
            return
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        self.monitor.forget_after(state.global_step)
        self.sizer.forget_after(state.global_step)
        self.monitor.check_if_due(state, last)
        if self.monitor.reason or self.sizer.reached:
            self.trainer.state = state
        else:
            self.trainer.train(resume_from_checkpoint=str(last))

    def judged(self, adapter: Path) -> HeldOut:
        """Return what the teacher with the PEFT folder `adapter` does on the held-out pairs."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        model, weights = self.trainer.model, load_file(adapter / "adapter_model.safetensors")
        if is_sharded():
            _set_shards(model, weights)
        else:
            set_peft_model_state_dict(model, weights)
        return held_out_report(model, self.sizer.kl(model), self._held_out, self._settings.beta)


def _with_room(probe: Probe, model: Any) -> Probe:
    """Return `probe`, before which the frozen weights of `model` leave the memory: the probe opens them once more."""
    weak = weakref.ref(model)  # the monitor, which has the probe, outlives the trainer

    def probed(adapter: Path) -> ProbeResult:
        if (frozen := weak()) is not None:
            FilePages(frozen).release_frozen()
        return probe(adapter)

    return probed


def _set_shards(model: Any, weights: Mapping[str, Any]) -> None:
    """Set the adapter of a model of whose weights each rank holds a part; PEFT can only set whole ones.

    Raises ArteError: the model lacks a weight of the adapter.
    """
    import torch
    from torch.distributed.tensor import distribute_tensor

    unset = set(weights)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            key = name.replace(".default.", ".")
            if key in weights:
                whole = weights[key].to(weight.device, weight.dtype)
                weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements))
                unset.discard(key)
    if unset:
        raise ArteError(
            f"The spread model has no place for {len(unset)} of the adapter's {len(weights)} weights: {min(unset)}",
            "Set train.shard_teacher = false, and install the tested versions: pip install 'arte-edge[train]'.",
        )


def _with_weight(collate: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return TRL's collator with the weight of the pair in a batch of one."""
    import torch

    def weighed(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {**collate(rows), "weight": torch.tensor([row["weight"] for row in rows])}

    return weighed


def _result(out: Path, report: Mapping[str, Any]) -> DpoResult:
    lists = {"history": tuple(report["history"]), "probes": tuple(report["probes"])}
    return DpoResult(**{**report, **lists, "held_out": HeldOut(**report["held_out"]), "adapter": out})

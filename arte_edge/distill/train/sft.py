"""Supervised fine-tuning of the student, on completions only.

TRL's trainer gets token ids and labels that are made here, so that what is learned
is what an engine will be given: the tokens of the prompt carry no loss, and the end
token closes each completion.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from arte_edge.cache import sha256_checkpoint
from arte_edge.distill.train.checkpoints import Workspace, finished
from arte_edge.distill.train.common import (
    Encoder,
    Progress,
    SftSettings,
    arguments,
    check_rows,
    free_memory,
    freed_memory_kept,
    history_of,
    keep_going,
    load,
    lora_config,
    main_rank_saves,
    quiet_training,
    training_order,
)
from arte_edge.distill.train.completion_head import score_completions_only
from arte_edge.distill.train.lora_merge import check_merge, merge_adapter, write_checkpoint
from arte_edge.distill.train.ranks import is_main, is_sharded, train_on_ranks, world_size
from arte_edge.errors import InputError
from arte_edge.runtimes.transformers.placement import multiplies_bfloat16
from arte_edge.store import content_key, write_jsonl
from arte_edge.transformers_load import MergeCheck

if TYPE_CHECKING:
    import torch

_MERGE_PROMPTS = 8
_IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class SftResult:
    """A tuned student."""

    checkpoint: Path  # 16-bit safetensors, with the base's tokenizer files
    steps: int
    examples: int  # rows that were trained on
    dropped: int  # rows longer than max_length
    seconds: float
    history: tuple[dict[str, float], ...]  # a row a step: loss, learning_rate, mean_token_accuracy, …
    merge: MergeCheck | None  # for LoRA


def train_sft(
    checkpoint: Path,
    rows: Sequence[Mapping[str, Any]],
    out: Path,
    settings: SftSettings | None = None,
    *,
    progress: Progress | None = None,
    processes: int = 1,
) -> SftResult:
    """Fine-tune `checkpoint` on `rows` (``prompt`` and ``completion``, rendered text) into the folder `out`.

    A row with a soft label also has ``others``: completions, each with its part of the target; the row's own
    completion has the rest. With several `processes` each has a share of every batch (`ranks`).

    Killed at any moment, the same call resumes from its last checkpoint to the same
    weights; a finished one returns at once.

    Raises:
        InputError: no rows, a row without its texts, no row that fits, an unreadable checkpoint,
            or an `out` that holds something else.
        ArteError: the training libraries are missing, or a merged adapter is not the same model.
    """
    settings = settings or SftSettings()
    texts = [{key: value for key, value in row.items() if key != "others"} for row in rows]
    check_rows(texts, ("prompt", "completion"), "training example")
    sha256 = sha256_checkpoint(checkpoint)
    request = content_key("sft", sha256, [dict(row) for row in rows], settings.model_dump())
    if done := finished(out, request, _result):
        return done
    workspace = Workspace(out, request)
    if processes > 1:
        job: dict[str, Any] = {"checkpoint": str(checkpoint), "rows": [dict(row) for row in rows]}
        job["settings"] = settings.model_dump(mode="json")
        train_on_ranks("sft", job, workspace, processes, progress)
    else:
        train_here(checkpoint, rows, settings, workspace, progress)
    done = finished(out, request, _result)
    assert done is not None
    return done


def train_here(
    checkpoint: Path,
    rows: Sequence[Mapping[str, Any]],
    settings: SftSettings,
    workspace: Workspace,
    progress: Progress | None,
) -> None:
    """Train in this process, which may be one of several ranks; rank 0 writes the result to its place."""
    began = time.monotonic()
    with quiet_training(), freed_memory_kept():
        trainer, counts = _trainer(checkpoint, rows, settings, workspace, progress)
        last = workspace.last_checkpoint()
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        history, steps = history_of(trainer), trainer.state.global_step
        if not is_main():
            return
        staged, merge = _write(trainer.model, checkpoint, rows, settings, workspace)
        del trainer
        free_memory()
    write_jsonl(staged / "log.jsonl", history)
    report = {"steps": steps, **counts, "seconds": round(time.monotonic() - began, 3)}
    report |= {"history": history, "merge": merge}
    workspace.finish(staged, report)


def encode_sft(encoder: Encoder, rows: Sequence[Mapping[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Return ``input_ids`` and ``labels`` of each row that fits; a prompt's labels are -100."""
    encoded = []
    for row in rows:
        prompt = encoder.prompt(row["prompt"])
        completion = encoder.completion(row["prompt"], row["completion"])
        if len(prompt) + len(completion) <= max_length:
            labels = [_IGNORED] * len(prompt) + completion
            encoded.append({"input_ids": prompt + completion, "labels": labels})
    return encoded


def encode_soft(encoder: Encoder, rows: Sequence[Mapping[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Return `encode_sft` of all completions of each row, its own first, with their ``weights``; all must fit."""
    found = []
    for row in rows:
        others = row.get("others", {})
        weights = {row["completion"]: 1.0 - sum(others.values()), **others}
        each = [{"prompt": row["prompt"], "completion": text} for text in weights]
        made = encode_sft(encoder, each, max_length)
        if len(made) == len(each):
            lists = {key: [one[key] for one in made] for key in ("input_ids", "labels")}
            found.append({**lists, "weights": list(weights.values())})
    return found


def _weigh(trainer: Any, model: Any) -> None:
    """Let `trainer`, whose bare model is `model`, train on rows of `encode_soft`.

    Its loss is then a mean over tokens, in which those of a completion have its weight: the expected negative
    log-likelihood under the soft labels. All completions of a row are in one batch, so that the weights stand in the
    same relation everywhere, and what they have in common is computed once.
    """
    import torch

    pad, theirs = trainer.data_collator, model.forward

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        flat = [
            {"input_ids": ids, "labels": labels}
            for row in rows
            for ids, labels in zip(row["input_ids"], row["labels"], strict=True)
        ]
        return {**pad(flat), "weights": torch.tensor([weight for row in rows for weight in row["weights"]])}

    def forward(self: Any, *args: Any, weights: Any = None, **kwargs: Any) -> Any:
        out = theirs(*args, **kwargs)
        if weights is not None:  # [n_row]; TRL divides the sum by the number of labelled tokens
            mask, each = out.label_mask, weights.unsqueeze(1)
            sums = torch.stack([mask.sum(), (mask * each).sum()])
            if world_size() > 1:  # the other rows of the batch are there
                torch.distributed.all_reduce(sums)
            out.log_probs = out.log_probs * each * (sums[0] / sums[1])
        return out

    trainer.data_collator, model.forward = collate, MethodType(forward, model)


def _trainer(
    checkpoint: Path,
    rows: Sequence[Mapping[str, Any]],
    settings: SftSettings,
    workspace: Workspace,
    progress: Progress | None,
) -> tuple[Any, dict[str, int]]:
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(checkpoint, frozen=settings.lora is not None)
    soft = any("others" in row for row in rows)
    encoded = (encode_soft if soft else encode_sft)(Encoder(tokenizer), rows, settings.max_length)
    if not encoded:
        raise InputError(
            f"No training example fits into {settings.max_length} tokens", "Raise max_length or shorten them."
        )
    lengths = [len(row["input_ids"][0] if soft else row["input_ids"]) for row in encoded]
    order = training_order(lengths, settings.batch_size, settings.epochs, settings.seed)
    ids, labels = (
        [each for row in encoded for each in (row[key] if soft else [row[key]])] for key in ("input_ids", "labels")
    )
    first, last = min(ids), max(ids)  # what these two begin with, all do
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    n_at_once = settings.batch_size * len(ids) // len(encoded)
    how = arguments(
        checkpoint,
        workspace,
        settings,
        len(order),
        "linear",
        most=settings.batch_size,
        at_once=shared + n_at_once * (max(map(len, ids)) - shared),  # see `completion_head`
        labelled=n_at_once * max(sum(each != _IGNORED for each in one) for one in labels),
    )
    examples = [encoded[i] for i in order]
    while world_size() > 1 and len(examples) % (world_size() * how["per_device_train_batch_size"]):
        examples.append(_without_labels(examples[-1]))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(packing=False, remove_unused_columns=not soft, **how),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=lora_config(settings.lora) if settings.lora else None,
        callbacks=[keep_going(workspace, settings.save_every_s, progress)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for data
    main_rank_saves(trainer)
    bare = trainer.model.get_base_model() if settings.lora else trainer.model
    score_completions_only(bare)
    if settings.lora is None:
        gradients_in_bfloat16(bare)
    if soft:
        _weigh(trainer, bare)
    return trainer, {"examples": len(encoded), "dropped": len(rows) - len(encoded)}


def _without_labels(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example like this one from which nothing is learned: it fills up the last batch of a rank."""
    ids, labels = example["input_ids"], example["labels"]
    if "weights" in example:
        return {"input_ids": ids[:1], "labels": [[_IGNORED] * len(labels[0])], "weights": [1.0]}
    return {"input_ids": ids, "labels": [_IGNORED] * len(labels)}


def _write(
    model: Any, checkpoint: Path, rows: Sequence[Mapping[str, Any]], settings: SftSettings, workspace: Workspace
) -> tuple[Path, dict[str, Any] | None]:
    """Write the trained model to the work folder; return its path, and the check of a merge."""
    staged = workspace.folder / "result"
    shutil.rmtree(staged, ignore_errors=True)
    if settings.lora is None:
        return write_checkpoint(model, checkpoint, staged, settings.dtype), None
    adapter = workspace.folder / "adapter"
    model.save_pretrained(adapter)
    merge_adapter(checkpoint, adapter, staged, settings.dtype)
    prompts = [row["prompt"] + row["completion"] for row in rows[:_MERGE_PROMPTS]]
    return staged, asdict(check_merge(checkpoint, adapter, staged, prompts))


def _result(out: Path, report: Mapping[str, Any]) -> SftResult:
    merge = MergeCheck(**report["merge"]) if report["merge"] else None
    return SftResult(**{**report, "checkpoint": out, "history": tuple(report["history"]), "merge": merge})


def gradients_in_bfloat16(model: Any) -> bool:
    """Let the linear layers of `model` compute gradients in bfloat16, all else in float32; return whether they will.

    Two thirds of a step are products of the backward pass, and a processor with bfloat16 products computes them twice
    as fast. Rounding a gradient to eight bits changes its direction by a cosine of 0.9995, and Adam's steps less. Mixed
    precision as usual, with a forward pass in bfloat16 too, trains worse: the weights of a checkpoint are 16-bit
    values, a step at the rates of fine-tuning moves them by less than half of bfloat16's spacing, and the forward pass
    would round every such step away (SmolLM2-135M after one step at 1e-5: loss 5.6, and 6.3 in bfloat16).

    They will not on a GPU, on a processor that does not multiply bfloat16, with ``ARTE_EDGE_DTYPE=float32``, and
    where weights are spread over several ranks.
    """
    import torch

    if model.device.type != "cpu" or is_sharded() or not multiplies_bfloat16():
        return False
    product = _product()

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = product.apply(x, self.weight, self.bias)
        return found

    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype == torch.float32:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return True


@cache
def _product() -> Any:
    """Return the autograd function ``x @ weight.T + bias``: torch is imported late."""
    import torch

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            ctx.save_for_backward(x.bfloat16(), weight)
            return torch.nn.functional.linear(x, weight, bias)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            (x, weight), gradient = ctx.saved_tensors, gradients[0]
            rows = gradient.reshape(-1, gradient.shape[-1])  # [n_token, n_out]
            rounded, (of_x, of_weight, of_bias) = rows.bfloat16(), ctx.needs_input_grad
            return (
                (rounded @ weight.bfloat16()).float().reshape(x.shape) if of_x else None,
                (rounded.t() @ x.reshape(-1, x.shape[-1])).float() if of_weight else None,
                rows.sum(0) if of_bias else None,
            )

    return Product

"""The same work with public parts alone: transformers, peft and TRL as their documentation uses them, no arte_edge.

    python benchmarks/whole_run_plain.py JOB.json      # started by whole_run.py

Prompts, choices, pairs and rows are those that a run of arte-edge has written (`whole_run_stages.Recorder`), with the
same token limits and the same order of examples. Writing is `generate` in batches of similar length, padded on the
left; scores are forward passes of a batch of prompts, whose cache is then repeated for the choices; the alignment is
TRL's `DPOTrainer` with a LoRA adapter of peft, merged for the texts after it; the student is tuned by TRL's
`SFTTrainer`. Floats and batch sizes are those that a short trial found the fastest, off the clock.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from whole_run_stages import Clock, read_rows

_TRIAL_TOKENS, _TRIAL_NEW = 128, 8
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(checkpoint: Path, dtype: str) -> tuple[Any, Any]:
    """Return a model and its tokenizer, which pads on the left."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=_TYPES[dtype]).eval(), tokenizer


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield places of similar length, `size` at a time."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def write(model: Any, tokenizer: Any, prompts: Sequence[str], how: dict[str, Any], size: int) -> int:
    """Complete every prompt as `how` says; return the number of tokens written."""
    sampled = {"do_sample": True, "temperature": how["temperature"], "top_p": how["top_p"], "top_k": 0}
    options: dict[str, Any] = sampled if how["temperature"] else {"do_sample": False}
    if how["stop"]:
        options |= {"stop_strings": list(how["stop"]), "tokenizer": tokenizer}
    n_token = 0
    for places in batches([len(prompt) for prompt in prompts], size):
        texts = [prompts[i] for i in places]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=how["max_tokens"], pad_token_id=tokenizer.pad_token_id, **options
            )
        new = out[:, inputs["input_ids"].shape[1] :]
        n_token += int((new != tokenizer.pad_token_id).sum())
    return n_token


def score(model: Any, tokenizer: Any, calls: Sequence[dict[str, Any]], size: int) -> list[list[float]]:
    """Return the log-probability of each choice after its prompt, ``[n_call][n_choice]``."""
    found: list[list[float]] = [[] for _ in calls]
    rows = [tokenizer(call["prompt"], add_special_tokens=False)["input_ids"] for call in calls]
    for places in batches([len(row) for row in rows], size):
        inputs = tokenizer.pad({"input_ids": [rows[i] for i in places]}, return_tensors="pt")
        mask, n = inputs["attention_mask"], [len(calls[i]["choices"]) for i in places]
        assert len(set(n)) == 1, "every prompt of a closed task has the same choices"
        options = [c for i in places for c in tokenizer(calls[i]["choices"], add_special_tokens=False)["input_ids"]]
        width = max(map(len, options))
        ids = torch.tensor([o + [tokenizer.pad_token_id] * (width - len(o)) for o in options])
        real = torch.tensor([[1] * len(o) + [0] * (width - len(o)) for o in options])
        with torch.inference_mode():
            position = (mask.cumsum(1) - 1).clamp(min=0)
            out = model(**inputs, position_ids=position, use_cache=True, logits_to_keep=1)
            first = out.logits[:, -1].float().log_softmax(-1).repeat_interleave(n[0], 0)
            logp = first.gather(1, ids[:, :1])[:, 0]
            if width > 1:
                cache = out.past_key_values
                cache.batch_repeat_interleave(n[0])
                wide, start = (t.repeat_interleave(n[0], 0) for t in (mask, mask.sum(1, keepdim=True)))
                later = model(
                    input_ids=ids[:, :-1],
                    attention_mask=torch.cat([wide, real[:, :-1]], 1),
                    position_ids=start + torch.arange(width - 1),
                    past_key_values=cache,
                )
                each = later.logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
                logp = logp + (each * real[:, 1:]).sum(1)
        for place, values in zip(places, logp.view(len(places), -1).tolist(), strict=True):
            found[place] = values
    return found


class Plain:
    """The stages, on what another side's run has written into the folder `inputs` of the job."""

    def __init__(self, clock: Clock, job: dict[str, Any]) -> None:
        self.clock, self.settings, self.folder = clock, job["settings"], clock.folder
        self.run = Path(job["inputs"]) / "run"
        self.inputs = {row["stage"]: row for row in read_rows(Path(job["inputs"]) / "inputs.jsonl")}
        self.teacher, self.student = Path(job["checkpoints"][0]), Path(job["checkpoints"][1])
        self.choice = self._trial(self.folder.parent / "plain-trial.json", job["batches"])

    def _trial(self, path: Path, sizes: Sequence[int]) -> dict[str, Any]:
        """Return the floats, and the batch sizes of teacher and student, that are the fastest here."""
        if path.is_file():
            return dict(json.loads(path.read_text("utf-8")))
        prompt = self.inputs["elicit"]["calls"][-1]["calls"][0]["prompt"]
        seconds: dict[str, dict[str, float]] = {}

        def timed(model: Any, tokenizer: Any, size: int) -> float:
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
            ids = ids[:, -_TRIAL_TOKENS:].repeat(size, 1)
            began = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=_TRIAL_NEW,
                    min_new_tokens=_TRIAL_NEW,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            return (time.perf_counter() - began) / size

        # In 16 bits a processor without instructions for them is a hundred times slower: one short text tells.
        for dtype in _TYPES:
            seconds.setdefault("floats", {})[dtype] = timed(*load(self.student, dtype), 1)
        floats = min(seconds["floats"], key=seconds["floats"].__getitem__)
        for who, checkpoint in (("teacher", self.teacher), ("student", self.student)):
            loaded = load(checkpoint, floats)
            seconds[who] = {str(size): timed(*loaded, size) for size in sizes}
        best = {who: int(min(seconds[who], key=seconds[who].__getitem__)) for who in ("teacher", "student")}
        choice = {"floats": floats, **best, "seconds_a_text": seconds}
        path.write_text(json.dumps(choice, indent=1) + "\n", "utf-8")
        return choice

    def _made(self, name: str) -> Path:
        """Return what an earlier stage of this side has made."""
        if not (self.folder / name).is_dir():
            raise SystemExit(f"plain: {self.folder / name} is missing: run all stages, or those before this one")
        return self.folder / name

    def _answer(self, asks: Sequence[dict[str, Any]], checkpoint: Path, who: str, adapter: Path | None = None) -> None:
        """Make the calls of `asks` with one model."""
        model, tokenizer = load(checkpoint, self.choice["floats"])
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        alike: dict[str, list[dict[str, Any]]] = {}  # the calls of one kind and sampling go together
        for ask in asks:
            alike.setdefault(json.dumps(ask.get("sampling"), sort_keys=True), []).extend(ask["calls"])
        for sampling, calls in alike.items():
            self.clock.n_call += len(calls)
            if (how := json.loads(sampling)) is None:
                score(model, tokenizer, calls, self.choice[who])
            else:
                prompts = [call["prompt"] for call in calls]
                self.clock.n_token += write(model, tokenizer, prompts, how, self.choice[who])

    def elicit(self) -> dict[str, Any]:
        self._answer(self.inputs["elicit"]["calls"], self.teacher, "teacher")
        return {}

    def prefer(self) -> dict[str, Any]:
        self._answer(self.inputs["prefer"]["calls"], self.student, "student")
        return {}

    def tailor(self) -> dict[str, Any]:
        self._answer(self.inputs["tailor"]["calls"], self.teacher, "teacher", self._made("adapter"))
        return {}

    def evaluate(self) -> dict[str, Any]:
        tuned: tuple[list[Any], list[Any]] = ([], [])
        for ask in self.inputs["evaluate"]["calls"]:
            tuned[ask["what"].startswith("tuned")].append(ask)
        for asks, checkpoint in zip(tuned, (self.student, self._made("student")), strict=True):
            self._answer(asks, checkpoint, "student")
        return {}

    def align(self) -> dict[str, Any]:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

        keys, how = ("prompt", "chosen", "rejected"), self.settings["align"]
        pairs = [{key: row[key] for key in keys} for row in self._ordered("align", "pairs.jsonl")]
        model, tokenizer = load(self.teacher, self.choice["floats"])
        both = how["sft_weight"] > 0
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                beta=how["beta"],
                loss_type=["sigmoid", "sft"] if both else ["sigmoid"],
                loss_weights=[1.0, how["sft_weight"]] if both else None,
                lr_scheduler_type="cosine",
                **self._arguments(how, len(pairs), batch_size=1, accumulate=how["batch_size"], warmup=0.1),
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=how["lora_rank"],
                lora_alpha=2 * how["lora_rank"],
                target_modules=how["lora_targets"],
                task_type="CAUSAL_LM",
            ),
        )
        return self._trained(trainer, "adapter", "align")

    def tune(self) -> dict[str, Any]:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        how = self.settings["tune"]
        rows = [{key: row[key] for key in ("prompt", "completion")} for row in self._ordered("tune", "rows.jsonl")]
        model, tokenizer = load(self.student, "float32")
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                lr_scheduler_type="linear",
                **self._arguments(how, len(rows), batch_size=how["batch_size"], accumulate=1, warmup=0.03),
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        return self._trained(trainer, "student", "tune")

    def _ordered(self, stage: str, file: str) -> list[dict[str, Any]]:
        """Return the examples of all epochs in the order in which the other side has seen them."""
        rows = read_rows(self.run / stage / file)
        return [rows[i] for i in self.inputs[stage]["order"]]

    def _arguments(
        self, how: dict[str, Any], n_row: int, *, batch_size: int, accumulate: int, warmup: float
    ) -> dict[str, Any]:
        """Return TRL's arguments. Its defaults would compute in 16 bits and save activations, slow on a processor."""
        return {
            "output_dir": str(self.folder / "trainer"),
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulate,
            "num_train_epochs": 1,
            "train_sampling_strategy": "sequential",
            "learning_rate": how["learning_rate"],
            "warmup_steps": int(warmup * -(-n_row // (batch_size * accumulate))),
            "max_length": None,
            "bf16": self.choice["floats"] == "bfloat16",
            "use_cpu": True,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": self.settings["seed"],
        }

    def _trained(self, trainer: Any, name: str, stage: str) -> dict[str, Any]:
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(str(self.folder / name))
        found = [round(float(row["loss"]), 5) for row in trainer.state.log_history if "loss" in row]
        return {"steps": len(found), "losses": found, "rows": len(set(self.inputs[stage]["order"]))}


def main(job: dict[str, Any]) -> None:
    """Run the stages of `job` that have no row yet."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl  # noqa: F401

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["repeat"])
    clock = Clock(job)
    plain = Plain(clock, job)
    for stage in job["stages"]:
        if clock.has(stage):
            continue
        run: Callable[[], dict[str, Any]] = getattr(plain, stage)
        clock.begin()
        facts = run()
        clock.end(stage, engine=f"transformers {plain.choice['floats']}", **facts)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))

"""Which learning rate of a LoRA adapter moves a teacher as far as the paper's 1e-7 does on all weights?

    python benchmarks/studies/lora_rate.py smollm2-135m-instruct --steps 8 --pairs-per-step 2
    python benchmarks/studies/lora_rate.py qwen2.5-coder-0.5b-instruct --steps 4 --pairs-per-step 1

The same DPO steps (AdamW, constant rate, beta 0.1, the pairs of the quick start in order) are taken on all weights and
on an adapter as `arte-edge` makes it. How far a model is from its beginning is the KL divergence in nats a token on the
completions of two pairs that no step sees. To second order it grows with the square of the rate, so one trial rate
gives the rate that matches, and a second training at that rate confirms it. One row a model is appended to the results.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.nn.functional import logsigmoid

from arte_edge.distill.config import RunConfig
from arte_edge.distill.stages.align import dpo_settings
from arte_edge.distill.train.common import load, lora_config
from arte_edge.models.resolve import resolve

HERE = Path(__file__).parents[1] / "results"
BETA, TRIAL_RATE = 0.1, 1e-5


def log_probs(model: Any, prompt: list[int], side: list[int]) -> torch.Tensor:
    """Return the log-probabilities of every token at the places of a completion, ``[n_completion, n_vocab]``."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.base_model(input_ids=torch.tensor([prompt + side]), use_cache=False).last_hidden_state[0]
    logits = base.get_output_embeddings()(hidden[len(prompt) - 1 : -1])
    return torch.log_softmax(logits.float(), -1)


def total(model: Any, prompt: list[int], side: list[int]) -> torch.Tensor:
    """Return the log-probability of a completion in nats."""
    return log_probs(model, prompt, side).gather(-1, torch.tensor(side)[:, None]).sum()


def distance(model: Any, watched: list[Any], before: list[torch.Tensor]) -> float:
    """Return the KL divergence of `model` from `before`, in nats a token."""
    with torch.no_grad():
        after = [log_probs(model, prompt, side) for prompt, side in watched]
    nats = sum(float((b.exp() * (b - a)).sum()) for a, b in zip(after, before, strict=True))
    return nats / sum(len(b) for b in before)


def train(checkpoint: Path, pairs: list[Any], options: argparse.Namespace, rate: float, *, lora: bool) -> list[float]:
    """Return the distance after each step."""
    torch.manual_seed(0)
    model, _ = load(checkpoint, frozen=lora)
    train_on, held_out = pairs[:-2], pairs[-2:]
    watched = [(prompt, side[:64]) for prompt, *sides in held_out for side in sides]
    with torch.no_grad():
        before = [log_probs(model, prompt, side) for prompt, side in watched]
        start = [[float(total(model, prompt, side)) for side in sides] for prompt, *sides in train_on]
    if lora:
        model = get_peft_model(model, lora_config(dpo_settings(RunConfig()).lora))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    found, place = [], 0
    for _ in range(options.steps):
        for _ in range(options.pairs_per_step):
            i = place % len(train_on)
            prompt, chosen, rejected = train_on[i]
            gain = total(model, prompt, chosen) - start[i][0] - total(model, prompt, rejected) + start[i][1]
            (-logsigmoid(BETA * gain) / options.pairs_per_step).backward()
            place += 1
        optimizer.step()
        optimizer.zero_grad()
        found.append(distance(model, watched, before))
        print(f"  {'LoRA' if lora else 'all weights'}, rate {rate:.2e}: {found[-1]:.3e} nats a token", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("teacher", help="a model that the registry knows")
    parser.add_argument("--pairs", type=Path, default=HERE / "quickstart" / "align" / "pairs.jsonl")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs-per-step", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-7, help="on all weights")
    parser.add_argument("--results", type=Path, default=HERE / "lora_rate" / "rows.jsonl")
    options = parser.parse_args()
    checkpoint = resolve(options.teacher).checkpoint()
    tokenizer = load(checkpoint, frozen=True)[1]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = map(json.loads, options.pairs.read_text("utf-8").splitlines())
    pairs = [tuple(ids(row[key]) for key in ("prompt", "chosen", "rejected")) for row in rows]
    full = train(checkpoint, pairs, options, options.rate, lora=False)
    trial = train(checkpoint, pairs, options, TRIAL_RATE, lora=True)
    rate = TRIAL_RATE * math.sqrt(full[-1] / trial[-1])
    confirmed = train(checkpoint, pairs, options, rate, lora=True)
    row = {
        "teacher": options.teacher,
        "steps": options.steps,
        "pairs_per_step": options.pairs_per_step,
        "rate_all_weights": options.rate,
        "kl_all_weights": full,
        "rate_trial": TRIAL_RATE,
        "kl_trial": trial,
        "rate_lora": rate,
        "kl_lora": confirmed,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(
        f"{options.teacher}: {options.rate:.0e} on all weights moves it {full[-1]:.2e} nats a token in "
        f"{options.steps} steps, LoRA at {rate:.2e} {confirmed[-1]:.2e}"
    )


if __name__ == "__main__":
    main()

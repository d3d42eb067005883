"""What training on one draft alone does to the student, on a processor: the student's own engine, trained in place.

    python benchmarks/studies/score_worth_influence.py WORK.json STUDENT OUT-influence.npz --questions 40

As `score_worth_measure.py` does on a GPU: two Adam steps on one draft, then the probabilities of the right
answers to fresh questions without an example, less what they were before. STUDENT is a checkpoint folder.
Killed, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from score_worth_scores import forced_outcome

from arte_edge.cache import atomic_file
from arte_edge.distill.prompts import ANSWER_CLOSE, ANSWER_PREFILL, STEP_BY_STEP, student_messages
from arte_edge.runtimes.prompt_render import render
from arte_edge.runtimes.transformers.model import TransformersEngine
from arte_edge.tasks.loaders import load_task

RATE, STEPS_TAKEN = 2e-5, 2
IGNORED = -100


class Learner:
    """One student that can be trained on a draft, asked, and made what it was."""

    def __init__(self, folder: Path, work: Mapping[str, Any], items: int) -> None:
        self.engine = TransformersEngine(folder, sha256="", device="cpu", dtype="float32")
        self.model, self.task = self.engine.model, load_task(work["task"])
        self.base = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        asked = work["outcome"][:items]
        self.options = [self.task.answer.options(row["input"]) for row in asked]
        self.truth = np.array([o.index(r["target"]) for o, r in zip(self.options, asked, strict=True)])
        self.prompts = [self._prompt(row["input"], ANSWER_PREFILL) for row in asked]

    def _prompt(self, question: str, opening: str) -> str:
        return render(self.engine, student_messages(self.task, question, []), opening)

    def reset(self) -> None:
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(self.base[name])

    def example(self, draft: Mapping[str, str]) -> tuple[list[int], int]:
        """Return a draft's tokens, and how many of them are the prompt."""
        prompt = self.engine.text.tokens(self._prompt(draft["input"], STEP_BY_STEP))
        completion = self.engine.text.tokens(f" {draft['text'].strip()}")
        end = self.model.generation_config.eos_token_id
        return [*prompt, *completion, end if isinstance(end, int) else end[0]], len(prompt)

    def train(self, batches: Sequence[Sequence[tuple[list[int], int]]], rate: float) -> None:
        """Take an Adam step a batch of examples, the rate falling linearly, gradients clipped at norm 1."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=0.0)
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = rate * (len(batches) - step) / len(batches)
            ids = torch.zeros((len(batch), max(len(tokens) for tokens, _ in batch)), dtype=torch.long)
            labels = torch.full_like(ids, IGNORED)
            for row, (tokens, prompt) in enumerate(batch):
                # What stands behind them is seen by no token that carries a loss.
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, prompt : len(tokens)] = ids[row, prompt : len(tokens)]
            self.model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def asked(self) -> dict[str, Any]:
        closed = [[choice + ANSWER_CLOSE for choice in own] for own in self.options]
        return forced_outcome(np.array(self.engine.choose_each(self.prompts, closed)), self.truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", type=int, default=40, help="drafts of the first so many")
    parser.add_argument("--items", type=int, default=64, help="fresh questions")
    options = parser.parse_args()
    work = json.loads(options.work.read_text("utf-8"))
    learner = Learner(options.student, work, options.items)
    base = learner.asked()
    known = dict(np.load(options.out)) if options.out.is_file() else {}
    found: dict[str, list[Any]] = {key: list(values) for key, values in known.items()}
    began = time.monotonic()
    places = [i for i, draft in enumerate(work["drafts"]) if draft["question"] < options.questions]
    for place in places[len(found.get("places", [])) :]:
        learner.reset()
        learner.train([[learner.example(work["drafts"][place])]] * STEPS_TAKEN, RATE)
        for key, value in learner.asked().items():
            found.setdefault(key, []).append(value - base[key])
        found.setdefault("places", []).append(place)
        with atomic_file(options.out) as temporary, temporary.open("wb") as file:
            arrays: dict[str, Any] = {key: np.array(values) for key, values in found.items()}
            np.savez_compressed(file, **arrays)
        change = found["probability_free"][-1]
        print(f"{len(found['places'])} of {len(places)}, {time.monotonic() - began:.0f} s, {change:+.5f}", flush=True)


if __name__ == "__main__":
    main()

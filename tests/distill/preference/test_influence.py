"""Influence: the products are what a small step really does, a killed scoring goes on, and what the errors mean."""

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tiny import Folders, Patch

from arte_edge.distill.preference import scoring
from arte_edge.distill.preference.influence import PARTS, Influence, Question, standard_error

ROOMS = ("lamp off", "music on", "door")
QUESTIONS = tuple(
    Question(f"{tiny.SPECIAL[0]}turn it {'on and ' * (i % 3)}off {i}:", ROOMS[: 2 + i % 2], i % 2) for i in range(9)
)
DRAFT = (f"{tiny.SPECIAL[0]}dim the lights:", " It is about the lights, so lamp off")
STEP = 3e-5  # norms are float32 inside: a smaller one drowns in their rounding


@pytest.fixture(scope="session")
def students(tmp_path_factory: Folders) -> Any:
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        if family == "llama":
            return tiny.write_student(folder)
        inner = tiny.bpe([q.prompt for q in QUESTIONS] * 9 + [*ROOMS], tiny.SPECIAL, 300, begin=tiny.SPECIAL[0])
        tokenizer = tiny.chat_tokenizer(inner, bos_token=tiny.SPECIAL[0], eos_token=tiny.SPECIAL[2])
        shape = {"head_dim": 16, "initializer_range": 0.1, "sliding_window": 8}
        return tiny.save_checkpoint(folder, tokenizer, family, dtype="bfloat16", **shape)

    return make


class Plain:
    """The same student in float64, one sequence at a time: its objective, and its loss on a draft."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder).double()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def logp(self, prompt: list[int], rest: list[int]) -> Any:
        import torch

        ids = torch.tensor([*prompt, *rest])
        logp = self.model(ids[None]).logits[0, :-1].log_softmax(-1)
        return logp.gather(1, ids[1:, None])[len(prompt) - 1 :].sum()

    def objective(self, free: bool) -> float:
        import torch

        logp = np.full((len(QUESTIONS), len(ROOMS)), np.nan)
        with torch.no_grad():
            for i, q in enumerate(QUESTIONS):
                start = self.ids(q.prompt)
                for j, choice in enumerate(q.choices):
                    logp[i, j] = float(self.logp(start, self.ids(q.prompt + choice)[len(start) :]))
        logp -= np.nanmean(logp, axis=0) if free else 0.0
        return float(
            np.mean([row[q.right] - np.log(np.nansum(np.exp(row))) for q, row in zip(QUESTIONS, logp, strict=True)])
        )

    def effect(self, *, free: bool, upper: bool) -> float:
        """Return how the objective changes by a step against the sign of the draft's gradient, for a rate of 1."""
        import torch

        start, end = self.ids(DRAFT[0]), [self.tokenizer.eos_token_id]
        (-self.logp(start, self.ids("".join(DRAFT))[len(start) :] + end)).backward()
        moved = [w for name, w in self.model.named_parameters() if not upper or ".layers.1." in name]
        signs = [w.grad.sign() for w in moved]
        found = []
        for step in (-STEP, 2 * STEP):
            with torch.no_grad():
                for w, sign in zip(moved, signs, strict=True):
                    w += step * sign
            found.append(self.objective(free))
        return (found[0] - found[1]) / (2 * STEP)


@pytest.mark.parametrize(
    ("family", "free", "layers"), [("llama", True, 1.0), ("llama", False, 0.5), ("gemma3_text", True, 0.5)]
)
def test_the_products_are_what_a_small_step_does(students: Any, family: str, free: bool, layers: float) -> None:
    folder = students(family)
    found = Influence(folder, QUESTIONS, free=free, layers=layers).of(*DRAFT)
    assert found.shape == (PARTS,)
    assert found.sum() == pytest.approx(Plain(folder).effect(free=free, upper=layers < 1), rel=0.02)


def test_what_all_drafts_share_is_no_error_of_a_comparison() -> None:
    rng = np.random.default_rng(0)
    drafts, parts = rng.normal(size=(400, 1)), 9 * rng.normal(size=(1, PARTS))
    assert standard_error(drafts + parts) == pytest.approx(0.0, abs=1e-9)
    noise = rng.normal(size=(400, PARTS))
    assert standard_error(drafts + parts + noise) == pytest.approx(math.sqrt(PARTS), rel=0.1)


def test_a_killed_scoring_goes_on_and_a_student_is_loaded_only_for_what_is_missing(
    house: Any, scored: Any, monkeypatch: Patch
) -> None:
    made: list[tuple[str, str]] = []
    loaded: list[int] = []
    limit = [5]

    class Fake:
        def __init__(self, checkpoint: Path, questions: Any, **_: Any) -> None:
            loaded.append(len(questions))

        def of(self, prompt: str, completion: str) -> Any:
            if len(made) == limit[0]:
                raise KeyboardInterrupt
            made.append((prompt, completion))
            return np.array([len(completion), 1.0])

    monkeypatch.setattr(scoring, "Influence", Fake)
    house.teacher.word = lambda prompt: f"{zlib.crc32(prompt.encode())}"  # no two rationales are the same
    tables: dict[str, Any] = {
        "form": "reasoning-first",
        "prefer": {"score": "influence"},
        "calibrate": {"k": 12, "items": 20},
    }
    with pytest.raises(KeyboardInterrupt):
        scored(**tables)
    house.run_open.close()
    limit[0] = 10_000
    run, summary, rows = scored(**tables)
    assert loaded == [12, 12] and len(set(made)) == len(made) == summary["drafts"]
    # What is scored is what the student will be trained on: the bare question, the rationale, the tagged answer.
    assert all("It is" in text and text.endswith("</ans>") and "Let's" not in prompt for prompt, text in made)
    assert summary["measured"] == summary["drafts"]  # gradients, whatever the number of questions
    assert rows[0]["standard_error"] > 0 and rows[0]["items"] == 12
    means = run.read("prefer", "questions.jsonl")
    n = means[0]["rationales"]
    assert means[0]["standard_error"] == pytest.approx(rows[0]["standard_error"] / math.sqrt(n), rel=0.01)
    again = house.folder / "prefer" / "manifest.json"
    again.unlink()
    assert scored(**tables)[2] == rows and len(loaded) == 2
    # Another rate changes the scale of the scores, and computes nothing anew.
    faster = scored(**tables, tune={"learning_rate": 2e-4})[2]
    assert len(loaded) == 2 and faster[0]["measured"] == pytest.approx(10 * rows[0]["measured"], rel=0.01)

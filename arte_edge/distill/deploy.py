"""The latency budget of the device that the student is for: how many tokens an answer may have.

    budget = (max_answer_seconds - prompt_tokens / prefill rate) · decode rate

`prompt_tokens` is the 95th percentile over the validation examples, asked as the student will be,
in the student's own tokens. With a budget, a run changes in three places:

* prefer: ``accuracy`` cuts the student off at the budget, so that an answer which does not come
  in time is no answer. The other scores write nothing; there a draft pays for its own length.
  A probability of being right is multiplied by the share of the draft that the device can
  write in time, ``min(1, budget / tokens)``, and a log-probability gets the share's logarithm
  added. So a draft that is a little too long is a little worse, and the teacher still hears
  which of two long drafts taught the student more.
* tailor: the teacher is shown worked examples that fit, what is too long trains nobody, and the
  questions that this leaves with nothing get draws (`arte_edge.distill.within`).
* evaluate: base and tuned student stop at the budget.

Drafts are elicited as ever: preferences need both short and long ones to choose from.

The rates come from rooms above this one (`DeviceSide`, handed in by the command). What was decided
is kept in ``deploy.json``: a later benchmark does not change a run that has begun.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from arte_edge.distill.config import Deploy
from arte_edge.distill.prompts import STEPS, student_messages
from arte_edge.errors import ArteError, InputError
from arte_edge.models.local import LocalModel
from arte_edge.store import write_atomic

if TYPE_CHECKING:
    from arte_edge.distill.run import Run

__all__ = ["FILE_NAME", "Budget", "DeviceSide", "Rates", "budget_tokens", "pay", "settle"]

FILE_NAME = "deploy.json"
_LEAST = 8  # tokens: an answer in its tags and a word before it
_PERCENTILE = 95


@dataclass(frozen=True)
class Rates:
    """How fast one file reads and writes on one device, in tokens a second, and how that is known."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    evidence: Literal["measured", "predicted"]
    source: str  # in words: runtime and threads of a measurement, or what a prediction rests on


@dataclass(frozen=True)
class Budget:
    """What a run does with the rates; `answer_tokens` in tokens of the student."""

    answer_tokens: int
    prompt_tokens: int
    rates: Rates


@dataclass(frozen=True)
class DeviceSide:
    """What a run asks of the rooms above it, which it must not import."""

    rates: Callable[[Deploy, LocalModel], Rates]
    quantize: Callable[[Path, Path, str], object]  # 16-bit file, file to write, type


def budget_tokens(max_answer_seconds: float, prompt_tokens: int, rates: Rates) -> int:
    """Return how many whole tokens of answer fit into the time that reading the prompt leaves.

    Raises:
        InputError: fewer than an answer needs; says how many seconds would do.
    """
    reading_s = prompt_tokens / rates.prefill_tokens_per_s
    tokens = math.floor((max_answer_seconds - reading_s) * rates.decode_tokens_per_s + 1e-9)
    if tokens < _LEAST:
        least_s = reading_s + _LEAST / rates.decode_tokens_per_s
        raise InputError(
            f"deploy.max_answer_seconds = {max_answer_seconds:g}: reading {prompt_tokens} prompt tokens "
            f"takes {reading_s:.2f} s there ({rates.evidence}), which leaves {max(tokens, 0)} tokens to answer",
            f"Give it {math.ceil(least_s * 10) / 10:g} s or more, or a faster file in deploy.file.",
        )
    return tokens


def pay(score: float, tokens: int, most_tokens: int, *, log: bool) -> float:
    """Return a draft's `score` less what its length costs; `log`: the score is a log-probability in nats."""
    share = min(1.0, most_tokens / max(tokens, 1))
    return score + math.log(share) if log else score * share


def settle(run: Run, device_side: DeviceSide | None, *, update: bool) -> Budget | None:
    """Return the run's budget, decided once and kept in its folder; None without a ``[deploy]`` device.

    Raises:
        InputError: no rates can be had, or the time is too short for an answer.
    """
    config = run.config.deploy
    if not config.device:
        return None
    path = run.folder / FILE_NAME
    if (kept := None if update else _kept(path, config)) is not None:
        return kept
    if device_side is None:
        raise ArteError("deploy.device: this run was started without the means to ask for a device's speed")
    rates = device_side.rates(config, run.local(run.config.student))
    prompt_tokens = _prompt_tokens(run)
    tokens = budget_tokens(config.max_answer_seconds, prompt_tokens, rates)
    budget = Budget(tokens, prompt_tokens, rates)
    document = {"deploy": _settings(config), "budget": asdict(budget)}
    write_atomic(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    run.reporter.event("deploy", **document)
    return budget


def _kept(path: Path, config: Deploy) -> Budget | None:
    """Return what was decided from the same settings, None if there is nothing that can be read."""
    try:
        document = json.loads(path.read_bytes())
        if document["deploy"] != _settings(config):
            return None
        budget = document["budget"]
        return Budget(budget["answer_tokens"], budget["prompt_tokens"], Rates(**budget["rates"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _settings(config: Deploy) -> dict[str, Any]:
    """Return the settings that decide a budget; what a run does with it is no part of them."""
    return config.model_dump(mode="json", exclude={"draws"})


def _prompt_tokens(run: Run) -> int:
    student = run.config.student
    engine = run.engine(student)
    counts = [
        engine.count_tokens(run.render(engine, student_messages(run.task, example.input), STEPS, student))
        for example in run.task.validation
    ]
    return math.ceil(float(np.percentile(counts, _PERCENTILE)))

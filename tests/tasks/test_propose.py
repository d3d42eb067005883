"""Technique prompts from a teacher: usable ones are kept, others thrown away and asked for again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from arte_edge.engines.base import Completion, EngineIdentity, Request, Sampling
from arte_edge.errors import ArteError
from arte_edge.tasks.propose import parse_techniques, propose_techniques
from arte_edge.tasks.task import Example

SEEDS = [Example(f"Is the number {n} even or odd?", "odd" if n % 2 else "even") for n in range(5)]
STEPS = "Look at the last digit of the number and decide by it."
HALVE = "Halve the number in your head and see whether something is left over."
RULE = "Recall which digits are even, then compare the ending. Use two sentences."
PAIRS = "Imagine as many socks as the number says, pair them up, look for a single one."


class Teacher:
    """An engine that answers from a list and remembers what it was asked."""

    identity = EngineIdentity("fake", "teacher")
    chat_template = None
    special_tokens: dict[str, str] = {}  # noqa: RUF012
    supports_grammar = False

    def __init__(self, *answers: Completion | str) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[Request, Sampling]] = []

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.asked += [(request, sampling) for request in requests]
        answer = self.answers[(len(self.asked) - 1) % len(self.answers)]
        return [answer if isinstance(answer, Completion) else Completion(answer, "stop")]

    def continue_shared(self, prefix: str, suffixes: Sequence[str], sampling: Sampling) -> list[Completion]:
        return self.complete([Request(prefix + suffix) for suffix in suffixes], sampling)

    def choose(self, prefix: str, suffixes: Sequence[str], choices: Sequence[str]) -> NDArray[np.float64]:
        return np.zeros((len(suffixes), len(choices)))

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def close(self) -> None:
        self.answers.clear()


def tagged(*techniques: str) -> str:
    """What a model writes after the tag that was started for it."""
    parts = [f"<Technique_{n}>{text}</Technique_{n}>" for n, text in enumerate(techniques, start=1)]
    return "\n".join(parts).removeprefix("<Technique_1>")


def test_four_good_techniques_take_one_greedy_call() -> None:
    teacher = Teacher(tagged(STEPS, HALVE, RULE, PAIRS))
    techniques = propose_techniques(teacher, "Even or odd?", SEEDS)
    assert techniques == (
        STEPS + " Use one to three short sentences.",
        HALVE + " Use one to three short sentences.",
        RULE,
        PAIRS + " Use one to three short sentences.",
    )
    [(request, sampling)] = teacher.asked
    assert sampling.temperature == 0
    assert request.prompt.endswith("<Technique_1>")
    assert "Even or odd?" in request.prompt
    assert all(seed.input in request.prompt for seed in SEEDS[:3])


def test_unusable_techniques_are_asked_for_again_with_other_seeds() -> None:
    quoting = f"Since {SEEDS[0].input} is about zero, think of it as an even number."
    teacher = Teacher(
        tagged(STEPS, "...", "Think.", quoting),
        tagged(STEPS + "!", HALVE.upper(), "<b>Write the number down in bold letters.</b>"),
        tagged(RULE, PAIRS, "Ask a friend who is good at numbers what they think."),
    )
    techniques = propose_techniques(teacher, "Even or odd?", SEEDS)
    assert [text.split(".")[0] + "." for text in techniques] == [
        STEPS,
        HALVE.upper(),
        "Recall which digits are even, then compare the ending.",
        PAIRS,
    ]
    prompts = {request.prompt for request, _ in teacher.asked}
    assert len(prompts) == 3
    assert [sampling.temperature > 0 for _, sampling in teacher.asked] == [False, True, True]


def test_a_teacher_that_never_writes_four_ends_in_an_error_that_counts() -> None:
    teacher = Teacher(tagged(STEPS, HALVE), Completion("", "error", error="HTTP 500"))
    with pytest.raises(ArteError, match=r"2 usable technique prompts, 4 are needed \(last error: HTTP 500\)"):
        propose_techniques(teacher, "Even or odd?", SEEDS)
    assert len(teacher.asked) == 8


def test_the_started_tag_may_or_may_not_be_repeated_and_a_cut_one_is_dropped() -> None:
    text = f"{STEPS}</Technique_1>\n<Technique_2>{HALVE}\n</Technique_2>\n<Technique_3>Recall"
    assert parse_techniques(text) == parse_techniques("<Technique_1>" + text) == [STEPS, HALVE]
    assert parse_techniques("I cannot do that.") == []

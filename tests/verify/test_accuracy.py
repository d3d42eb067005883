from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from arte_edge.distill.prompts import STEP_BY_STEP
from arte_edge.errors import InputError
from arte_edge.tasks.task import Answer, Example, Task, rows_sha256
from arte_edge.verify.accuracy import check_accuracy, measure_accuracy

TEST = tuple(Example(f"test {i}?", "odd") for i in range(12))


def task(n: int = 100) -> Task:
    return Task(
        name="parity",
        description="Even or odd.",
        answer=Answer(kind="choice", choices=("even", "odd")),
        techniques=("Look.",),
        seed=(),
        validation=tuple(Example(f"{i}?", "odd" if i % 2 else "even") for i in range(n)),
        test_inputs=frozenset(e.key for e in TEST),
        test_sha256=rows_sha256(TEST),
        test_loader=lambda: TEST,
    )


@dataclass
class FakeStudent:
    """A runtime that answers parity correctly except for numbers below `ignores`."""

    ignores: int = 0
    name: str = "student"
    prompts: list[str] = field(default_factory=list)

    def render(self, messages: Sequence[Any]) -> str:
        return "<chat>" + messages[-1]["content"] + "</chat>"

    def generate(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str]) -> list[str]:
        self.prompts += prompts
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: str) -> str:
        if "test" in prompt:
            return " It is <ans>odd</ans>"
        number = int(prompt.rpartition("Question: ")[2].partition("?")[0])
        even = (number % 2 == 0) == (number >= self.ignores)
        return f" Look. <ans>{'even' if even else 'odd'}</ans>"


def measure(before: FakeStudent, after: FakeStudent, **options: Any) -> Any:
    return measure_accuracy(before, after, task(), **options)  # type: ignore[arg-type]


def test_both_models_answer_the_same_validation_examples() -> None:
    before, after = FakeStudent(), FakeStudent(30)
    found = measure(before, after)
    assert (found.split, found.n, found.reference_right, found.accuracy) == ("validation", 100, 100, 0.7)
    assert before.prompts == after.prompts
    assert all(
        prompt.startswith("<chat>Question: ") and prompt.endswith(STEP_BY_STEP) for prompt in before.prompts
    )
    assert found.low < 0.7 < found.high
    assert (found.lost, found.gained) == (30, 0) and found.difference == pytest.approx(-0.3)


def test_a_student_of_plain_text_is_prompted_in_plain_text() -> None:
    before = FakeStudent()
    measure(before, FakeStudent(), plain=True, limit=3)
    assert len(before.prompts) == 3
    assert before.prompts[0].startswith("Even or odd.") and "<chat>" not in before.prompts[0]


def test_the_test_split_is_read_in_the_final_evaluation_only() -> None:
    before = FakeStudent()
    measure(before, FakeStudent())
    assert not any("test" in prompt for prompt in before.prompts)
    final = measure(FakeStudent(), FakeStudent(), final=True)
    assert (final.split, final.n) == ("test", len(TEST))


def test_a_significant_drop_above_the_threshold_fails() -> None:
    check = check_accuracy(measure(FakeStudent(), FakeStudent(30)), 0.02)
    assert not check.passed
    assert check.measured == pytest.approx(0.3)
    assert "100.0% -> 70.0%" in check.note


def test_a_drop_within_chance_passes_and_so_does_any_without_a_threshold() -> None:
    assert check_accuracy(measure(FakeStudent(), FakeStudent(4)), 0.0).passed  # 4 of 100 lost: p = 0.125
    assert not check_accuracy(measure(FakeStudent(), FakeStudent(6)), 0.0).passed  # p = 0.03
    assert check_accuracy(measure(FakeStudent(), FakeStudent(30)), None).passed
    assert check_accuracy(measure(FakeStudent(30), FakeStudent()), 0.0).passed  # a gain


def test_a_task_without_examples_is_rejected() -> None:
    with pytest.raises(InputError, match=r"validation\.jsonl"):
        measure_accuracy(FakeStudent(), FakeStudent(), task(0))  # type: ignore[arg-type]

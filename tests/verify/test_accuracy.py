from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tiny import student_file

from arte_edge.asking.form import asking_of, instruction, with_instruction
from arte_edge.errors import InputError
from arte_edge.results.student_json import FILE_NAME, Asking, write_student
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.task import Answer, Example, Task, rows_sha256
from arte_edge.verify.accuracy import check_accuracy, measure_accuracy, noted_tokens, questions_for

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


CHAT = with_instruction("{% for m in messages %}[{{ m.content }}]{% endfor %}", instruction(task(), "answer-first"), {})


@dataclass
class FakeStudent:
    """A runtime that answers parity correctly except for numbers below `ignores`; a character is a token."""

    ignores: int = 0
    name: str = "student"
    chat_template: str | None = CHAT
    asked: list[Any] = field(default_factory=list)
    budgets: set[int] = field(default_factory=set)
    special_tokens = {"bos_token": ""}  # noqa: RUF012

    def render(self, messages: Sequence[Any]) -> str | None:
        return None if self.chat_template is None else render(self, messages)

    def tokenize(self, text: str) -> list[int]:
        return [0] * len(text)

    def chat(self, asked: Sequence[Any], max_tokens: int, stop: Sequence[str]) -> list[str]:
        assert self.chat_template is not None and "</ans>" in stop
        return self._write([*asked], [messages[-1]["content"] for messages in asked], max_tokens)

    def generate(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str]) -> list[str]:
        assert self.chat_template is None and stop == ("\n",)
        found = self._write([*prompts], [p.rpartition("Question: ")[2] for p in prompts], max_tokens)
        return [text.removeprefix("<ans>").removesuffix("</ans>") + "\n" for text in found]

    def _write(self, asked: list[Any], texts: list[str], max_tokens: int) -> list[str]:
        self.asked += asked
        self.budgets.add(max_tokens)
        return [f"<ans>{self._answer(text)}</ans>" for text in texts]

    def _answer(self, text: str) -> str:
        if "test" in text:
            return "odd"
        number = int(text.partition("?")[0])
        return "even" if (number % 2 == 0) == (number >= self.ignores) else "odd"


def measure(before: FakeStudent, after: FakeStudent, **options: Any) -> Any:
    return measure_accuracy(before, after, task(), **options)  # type: ignore[arg-type]


def test_both_models_get_the_same_bare_messages_through_their_chat_functions() -> None:
    before, after = FakeStudent(), FakeStudent(30)
    found = measure(before, after)
    assert (found.split, found.n, found.reference_right, found.accuracy) == ("validation", 100, 100, 0.7)
    assert before.asked == after.asked == [[{"role": "user", "content": f"{i}?"}] for i in range(100)]
    assert found.low < 0.7 < found.high
    assert (found.lost, found.gained) == (30, 0) and found.difference == pytest.approx(-0.3)


def test_a_model_that_holds_no_instruction_gets_it_as_system_text() -> None:
    def chat(asked: Sequence[Any], max_tokens: int, stop: Sequence[str]) -> list[str]:
        before.asked += asked
        return ["odd"] * len(asked)

    before = FakeStudent(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    before.chat = chat  # type: ignore[method-assign]
    assert measure(before, before, limit=4).accuracy == 0.5
    assert before.asked[0][0] == {"role": "system", "content": instruction(task(), "answer")}


def test_a_model_without_a_template_continues_plain_text() -> None:
    before, after = FakeStudent(chat_template=None), FakeStudent(1, chat_template=None)
    assert measure(before, after, limit=3).right == 2
    text = instruction(task(), "answer")
    assert before.asked == [f"{text}\n\nQuestion: {i}?\nAnswer:\n" for i in range(3)]


def test_the_budget_of_an_answer_is_the_tasks_unless_one_is_given() -> None:
    student = FakeStudent()
    measure(student, student)
    own, _ = asking_of(student, task())
    assert student.budgets == {own.answer_tokens}
    asked = questions_for(student, task(), 250)  # type: ignore[arg-type]
    measure(student, student, questions=asked)
    assert student.budgets == {own.answer_tokens, 250}


def test_the_budget_comes_from_the_student_json_beside_a_file(tmp_path: Path) -> None:
    path = tmp_path / "student-Q8_0.gguf"
    assert noted_tokens(path) == 0
    asking = Asking(form="answer", instruction="Say it.", answer_tokens=250)
    write_student(tmp_path, student_file(asking=asking))
    assert noted_tokens(path) == 250
    (tmp_path / FILE_NAME).write_text("{")
    assert noted_tokens(path) == 0


def test_the_test_split_is_read_in_the_final_evaluation_only() -> None:
    before = FakeStudent()
    measure(before, FakeStudent())
    assert not any("test" in messages[-1]["content"] for messages in before.asked)
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


def test_json_answers_have_a_slot_f1_beside_the_accuracy() -> None:
    class Slots(FakeStudent):
        def _answer(self, text: str) -> str:
            return '{"slots":{"a":"X","b":1}}' if text == "0?" else '{"slots":{"a":"y"}}'

    rows = tuple(Example(f"{n}?", '{"slots":{"a":"x","b":2}}') for n in range(2))
    slots = replace(task(), answer=Answer(kind="json", json_schema="{}"), validation=rows)
    found = measure_accuracy(Slots(), Slots(), slots)  # type: ignore[arg-type]
    assert (found.accuracy, found.slot_f1) == (0, pytest.approx(2 * 1 / (3 + 4)))
    assert "slot F1 28.6%" in check_accuracy(found, None).note
    assert measure_accuracy(FakeStudent(), FakeStudent(), task()).slot_f1 is None  # type: ignore[arg-type]

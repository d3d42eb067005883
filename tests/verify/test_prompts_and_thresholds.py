from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from arte_edge.asking.form import Form, instruction, with_instruction
from arte_edge.errors import InputError
from arte_edge.gguf.reader import FILE_TYPES
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.task import Answer, Example, Task
from arte_edge.verify.check import STRICTEST, TYPES, Thresholds, thresholds_for
from arte_edge.verify.prompts import built_in_prompts, prompts_from_file, task_prompts

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


class Chat:
    special_tokens = {"bos_token": "<s>"}  # noqa: RUF012

    def __init__(self, chat_template: str | None = CHAT) -> None:
        self.chat_template = chat_template

    def render(self, messages: Sequence[Any]) -> str | None:
        return None if self.chat_template is None else render(self, messages)


def test_built_in_prompts_have_questions_and_answers_in_the_model_s_format() -> None:
    chat, plain = built_in_prompts(Chat()), built_in_prompts(Chat(None))
    assert len(chat) == len(plain) >= 12
    assert all("[assistant]" in prompt and not prompt.endswith("[assistant]") for prompt in chat)
    assert all(prompt.startswith("<s>Question: ") and "[assistant]" not in prompt for prompt in plain)


def parity(n: int = 9) -> Task:
    def fail() -> tuple[Example, ...]:
        raise AssertionError("the test split was read")

    return Task(
        name="t",
        description="Say it.",
        answer=Answer(kind="boolean"),
        techniques=(),
        seed=(),
        validation=tuple(Example(f"q{i}", "True") for i in range(n)),
        test_loader=fail,
    )


@pytest.mark.parametrize(
    ("form", "answer"),
    [("answer", "True"), ("answer-first", "<ans>True</ans>"), ("reasoning-first", "<ans>True</ans>")],
)
def test_task_prompts_are_bare_validation_examples_with_answers_as_the_student_writes_them(
    form: Form, answer: str
) -> None:
    text = instruction(parity(), form)
    prompts = task_prompts(Chat(with_instruction(CHAT, text, {})), parity(), 4)
    assert prompts == [f"[system]{text}[user]q{i}[assistant]{answer}" for i in range(4)]


def test_other_models_are_shown_the_instruction() -> None:
    text = instruction(parity(), "answer")
    assert task_prompts(Chat(), parity(), 1) == [f"[system]{text}[user]q0[assistant]True"]
    assert task_prompts(Chat(None), parity(), 1) == [f"<s>{text}\n\nQuestion: q0\nAnswer:\nTrue"]


def test_prompts_come_from_lines_or_rows(tmp_path: Path) -> None:
    lines, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_text("one two\n\nthree\n", encoding="utf-8")
    rows.write_text('{"prompt": "p"}\n{"text": "t"}\n{"input": "i", "target": "x"}\n"s"\n', encoding="utf-8")
    assert prompts_from_file(lines) == ["one two", "three"]
    assert prompts_from_file(rows) == ["p", "t", "i", "s"]


@pytest.mark.parametrize("text", ["", "{", '{"label": 1}', "[1]", '{"text": 3}'])
def test_rows_without_text_are_rejected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.jsonl"):
        prompts_from_file(path)


def test_every_gguf_type_has_thresholds() -> None:
    assert set(FILE_TYPES.values()) <= set(TYPES)
    assert {"fp32", "int8", "int4"} <= set(TYPES)
    assert thresholds_for("q4_k_m") is TYPES["Q4_K_M"]
    with pytest.raises(InputError, match="Q9_X"):
        thresholds_for("Q9_X")


@pytest.mark.parametrize("name", ["kl_mean", "kl_p99", "perplexity_ratio", "accuracy_drop"])
def test_fewer_bits_never_have_a_stricter_threshold(name: str) -> None:
    order = (STRICTEST, "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ1_S")
    limits = [getattr(TYPES[type], name) for type in order]
    assert limits == sorted(limits)
    assert [TYPES[type].top1 for type in order] == sorted((TYPES[t].top1 for t in order), reverse=True)  # type: ignore[type-var]


def test_thresholds_of_a_recipe_are_checked() -> None:
    assert Thresholds(kl_mean=None).token_differences == 0
    for wrong in ({"kl_meen": 1.0}, {"top1": 1.5}, {"kl_mean": -1}):
        with pytest.raises(ValidationError):
            Thresholds.model_validate(wrong)

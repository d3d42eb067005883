"""The gate asks as a user asks: through each runtime's chat function and through the servers that users start."""

import string
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tiny import Folders, Make, Patch

from arte_edge.asking.form import Form, instruction, with_instruction
from arte_edge.gguf.convert import convert
from arte_edge.runtimes.llamacpp import servers
from arte_edge.runtimes.loader import open_model
from arte_edge.runtimes.onnxruntime import OnnxRuntime
from arte_edge.runtimes.prompt_render import Message
from arte_edge.runtimes.protocol import Runtime, Served
from arte_edge.verify.accuracy import check_as_asked, questions_for
from arte_edge.verify.check import Check, thresholds_for
from arte_edge.verify.gate import verify_file

from .conftest import BOS, TEMPLATE, Tiny, parity_task, write_checkpoint

pytest.importorskip("onnxruntime_genai")
# Whole characters only: what programs print of half ones differs.
LETTERS = sorted(set(string.ascii_letters + string.digits + string.punctuation) | {"Ġ", "Ċ"})
TASK = parity_task(8)
QUESTIONS: list[list[Message]] = [[{"role": "user", "content": f"Is {i} even or odd?"}] for i in (4, 17)]


def held(form: Form) -> str:
    return with_instruction(TEMPLATE, instruction(TASK, form), {"bos_token": BOS})


@pytest.fixture(scope="module")
def student(tmp_path_factory: Folders) -> Tiny:
    """A student of `TASK`, as checkpoint and GGUF, whose template holds its instruction."""
    from arte_edge.onnx.genai_builder import GenaiSettings, build

    folder = tmp_path_factory.mktemp("asked")
    checkpoint = write_checkpoint(folder / "student", alphabet=LETTERS)
    (checkpoint / "chat_template.jinja").write_text(held("reasoning-first"), "utf-8")
    build(checkpoint, folder / "genai", GenaiSettings(precision="fp32"))
    return Tiny(checkpoint, convert(checkpoint, folder / "student-F16.gguf"))


@pytest.fixture
def opened() -> Iterator[Make]:
    models: list[Any] = []

    def make(path: Path, kind: Any = None) -> Any:
        models.append(kind(path) if kind else open_model(path, threads=1))
        return models[-1]

    yield make
    for model in models:
        model.close()


@pytest.mark.parametrize("kind", ["transformers", "llama.cpp", "genai", "onnxruntime"])
def test_a_chat_is_what_the_model_writes_after_its_rendered_messages(kind: str, student: Tiny, opened: Make) -> None:
    genai = student.checkpoint.parent / "genai"
    paths = {"transformers": student.checkpoint, "llama.cpp": student.gguf}
    model = opened(paths.get(kind, genai), OnnxRuntime if kind == "onnxruntime" else None)
    prompts = [model.render(messages) for messages in QUESTIONS]
    assert all(instruction(TASK, "reasoning-first") in prompt for prompt in prompts)
    texts = model.chat(QUESTIONS, 24)
    assert texts == model.generate(prompts, 24) and all(texts) and texts[0] != texts[1]
    stop = texts[0][6:9]
    assert model.chat(QUESTIONS[:1], 24, (stop,)) == model.generate(prompts[:1], 24, (stop,))
    assert model.chat(QUESTIONS[:1], 24, (stop,))[0].endswith(stop)
    assert model.chat(QUESTIONS[:1], 2) != model.chat(QUESTIONS[:1], 24)


def check(model: Runtime, artifact: Runtime, allowed: int | None = 0) -> Check:
    asked = questions_for(model, TASK, answer_tokens=12)
    return check_as_asked(model, artifact, TASK, asked, TASK.validation, allowed)


def test_a_file_without_the_instruction_is_rejected_however_it_answers(
    student: Tiny, opened: Make, with_fields: Make
) -> None:
    reference, prompts = opened(student.checkpoint), ["Is 4 even or odd?"]
    limits = thresholds_for("F16")
    for template, shown in ((TEMPLATE, "does not hold"), (held("answer"), "but that of answer")):
        path = with_fields({"tokenizer.chat_template": template.encode()}, student.gguf)
        verdict = verify_file(reference, path, prompts, limits, task=TASK, answer_tokens=8, threads=1)
        note = next(check.note for check in verdict.failed if check.name == "as asked")
        assert shown in note and "its users do not know" in note
    good = verify_file(reference, student.gguf, prompts, limits, task=TASK, answer_tokens=8, threads=1)
    assert {check.name for check in good.failed} <= {"tokens"}, "letters that its vocabulary lacks"
    assert good.accuracy is not None and good.accuracy.n == 8


def test_the_servers_that_are_installed_answer_as_the_chat_function_does(student: Tiny, opened: Make) -> None:
    model = opened(student.gguf)
    found = check(model, model)
    assert found.passed and found.measured == 0
    assert "5 times a bare question" in found.note
    assert "llama-cpp-python's server gives the same 5 answers" in found.note
    assert "xllamacpp gives the same 5 answers" in found.note


def test_a_server_that_puts_another_prompt_in_front_is_noticed(
    student: Tiny, opened: Make, with_fields: Make, monkeypatch: Patch
) -> None:
    other = with_fields({"tokenizer.chat_template": TEMPLATE.encode()}, student.gguf)
    commands = servers._commands(other, 512, 1)
    monkeypatch.setattr(servers, "_commands", lambda *_: commands)
    model = opened(student.gguf)
    found = check(model, model)
    assert not found.passed and found.measured == 5
    assert "llama-cpp-python's server answers 5 of 5 questions differently" in found.note
    assert "xllamacpp answers 5 of 5" in found.note
    assert check(model, model, allowed=None).passed


def answers(model: Any, monkeypatch: Patch, **fields: Any) -> Check:
    def served(conversations: Sequence[Any], max_tokens: int, stop: Sequence[str]) -> list[Served]:
        texts = model.chat(conversations, max_tokens, stop)
        wrong: int = fields.pop("wrong", 0)
        return [Served("s", (*["?"] * wrong, *texts[wrong:]), **fields)]

    monkeypatch.setattr(model, "served", served)
    return check(model, model)


def test_one_near_tie_of_another_build_is_no_fault_and_more_are(
    student: Tiny, opened: Make, monkeypatch: Patch
) -> None:
    model = opened(student.gguf)
    assert answers(model, monkeypatch, wrong=1).passed
    assert not answers(model, monkeypatch, wrong=2).passed
    assert not answers(model, monkeypatch, wrong=1, own=True).passed


def test_what_is_said_of_a_server_is_shown(student: Tiny, opened: Make, monkeypatch: Patch) -> None:
    model = opened(student.gguf)
    found = answers(model, monkeypatch, unable="it ends with code 1")
    assert found.passed and "s gives no answer: it ends with code 1" in found.note
    assert "s penalizes" in answers(model, monkeypatch, remark="penalizes repetitions").note


def test_a_server_that_penalizes_repetitions_is_asked_not_to_and_the_note_says_so(monkeypatch: Patch) -> None:
    def ask(client: Any, conversations: Any, settings: dict[str, Any]) -> list[str]:
        assert settings["temperature"] == 0.0
        return ["odd"] if settings.get("repeat_penalty") == 1.0 else ["of"]

    monkeypatch.setattr(servers, "_ask", ask)
    monkeypatch.setattr(servers, "_commands", lambda *_: {servers._PYTHON: [], "other": []})
    monkeypatch.setattr(servers, "_running", lambda command: nullcontext())
    python, other = servers.served(Path("s.gguf"), QUESTIONS, 4, (), 64, 1)
    assert python.texts == ("odd",) and "repeat_penalty = 1" in python.remark
    assert other.texts == ("of",) and not other.remark


def test_a_server_that_does_not_start_is_said_and_ended(student: Tiny) -> None:
    broken = [sys.executable, "-c", "raise SystemExit(3)"]
    found = servers._served("broken", broken, student.gguf, QUESTIONS, {})
    assert found.unable == "it ends with code 3" and not found.texts

"""A question to a student: what constrains the answer, what is known of a file, and what is rejected before it runs."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tiny import Folders, Patch

import arte_edge as ae
from arte_edge.asking.ask import Student, accepted_file, choose
from arte_edge.asking.form import Form, instruction
from arte_edge.asking.grammar import gbnf
from arte_edge.errors import InputError
from arte_edge.results.student_json import Asking, Lineage, write_student
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Answer

LABELS = ("C", "C++", "Cab", "D", "Do-it")
QUESTIONS = tuple(f"q{i}" for i in range(12))


class Letters:
    """A model whose tokens are characters and which prefers what it is told to after each text; 0 ends."""

    stop_tokens = frozenset([0])

    def __init__(self, **after: str) -> None:
        self.after = after

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def logits(self, ids: Sequence[int]) -> Any:
        row = np.zeros(128, dtype=np.float32)
        row[ord(self.after.get("".join(map(chr, ids)), "\0"))] = 1
        return np.array([row] * len(ids))


@pytest.mark.parametrize(
    ("after", "chosen"),
    [
        ({"?": "C"}, "C"),
        ({"?": "C", "?C": "+"}, "C++"),
        ({"?": "C", "?C": "a"}, "Cab"),
        ({"?": "D"}, "D"),
        ({"?": "D", "?D": "o"}, "Do-it"),
        ({"?": "D", "?D": "+"}, "D"),  # no label goes on with it
    ],
)
def test_of_labels_that_begin_alike_the_end_token_decides(after: dict[str, str], chosen: str) -> None:
    assert choose(Letters(**after), "?", LABELS) == chosen  # type: ignore[arg-type]


def test_a_closing_tag_decides_in_place_of_the_end_token() -> None:
    assert choose(Letters(**{"?": "C", "?C": "<"}), "?", LABELS, "</ans>") == "C"  # type: ignore[arg-type]
    assert choose(Letters(**{"?": "C", "?C": "+"}), "?", LABELS, "</ans>") == "C++"  # type: ignore[arg-type]


def export(folder: Path, form: Form = "answer", **more: Any) -> Path:
    """Write an export of one tiny GGUF file whose student.json says how it is asked."""
    pytest.importorskip("llama_cpp")
    file = tiny.write_gguf(folder / "m-Q8_0.gguf")
    known = {"form": form, "instruction": "Say which.", "stops": ("\n",), "answer_tokens": 24}
    record = Asking.model_validate(known | {"choices": LABELS} | more)
    lineage = Lineage(source="run", task="labels")
    write_student(folder, tiny.student_file(tiny.artifact(), lineage=lineage, asking=record))
    return file


@pytest.fixture(scope="module")
def labels(tmp_path_factory: Folders) -> Path:
    return export(tmp_path_factory.mktemp("labels"))


def test_without_a_grammar_another_text_comes(labels: Path) -> None:
    free = ae.ask(labels, "q1", grammar=False)
    assert free.answer is None and free.text and free.tokens <= 24
    bound = ae.ask(labels, "q1")
    assert bound.answer in LABELS and bound.text == bound.answer and bound.tokens == len(bound.text)


def test_a_grammar_and_a_choice_by_logits_give_the_same_labels(labels: Path) -> None:
    # Tokens are single characters here, so that a label can be written in one way only.
    with Student(labels) as student:
        found = [str(student.ask(text)) for text in QUESTIONS]
        chosen = [choose(student.model, text + "\n", LABELS) for text in QUESTIONS]
    assert chosen == found and len(set(found)) > 1


@pytest.mark.parametrize("form", ["answer-first", "reasoning-first"])
def test_tagged_forms_end_with_a_label_in_tags(form: Form, tmp_path: Path, monkeypatch: Patch) -> None:
    path = export(tmp_path, form)
    with Student(path) as student:
        # As on a runtime that follows no grammars.
        monkeypatch.setattr(type(student.model), "constrained", lambda *_: None)
        reply = student.ask("q1")
    assert reply.answer in LABELS and reply.text.endswith(f"<ans>{reply.answer}</ans>")
    assert (reply.text.startswith("<ans>")) == (form == "answer-first")


def test_a_grammar_in_the_export_is_the_one_that_counts(tmp_path: Path) -> None:
    path = export(tmp_path, grammar="answer.gbnf", choices=(), json_schema="answer.json")
    (tmp_path / "answer.gbnf").write_text(gbnf(Answer(kind="number"), "answer") or "")
    (tmp_path / "answer.json").write_text('{"type": "number"}')
    reply = ae.ask(path, "q1", max_tokens=4)
    assert reply.answer is not None and float(reply.answer) == float(reply.text)


def test_xllamacpp_follows_the_grammar_too(labels: Path) -> None:
    pytest.importorskip("xllamacpp")
    # Each package has a llama.cpp of its own: one process loads one of them.
    code = "import arte_edge as ae, sys\nprint(*[ae.ask(sys.argv[1], q) for q in sys.argv[2:]], sep='|')"
    command = [sys.executable, "-c", code, str(labels), *QUESTIONS[:3]]
    environment = {**os.environ, "ARTE_EDGE_GGUF_RUNTIME": "xllamacpp"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip().split("|") == [str(ae.ask(labels, q)) for q in QUESTIONS[:3]]


def test_a_checkpoint_chooses_a_label_of_its_task(tiny_student: Path) -> None:
    with ae.open_student(tiny_student, task=tiny.TASK) as student:
        reply = student.ask("dim the lights in the hall")
        assert reply.answer in load_task(tiny.TASK).answer.choices and reply.text == reply.answer


def write_run(folder: Path) -> Path:
    """Write a run with a tuned student."""
    (folder / "tune").mkdir(parents=True)
    settings = f'[task]\nref = "{tiny.TASK}"\n[teacher]\nmodel = "a"\n[student]\nmodel = "b"\n'
    (folder / "run.toml").write_text(settings)
    tiny.write_gguf(folder / "tune" / "student-F16.gguf")
    return folder


def test_a_run_and_its_file_answer_alike(tmp_path: Path, monkeypatch: Patch) -> None:
    pytest.importorskip("llama_cpp")
    run, text = write_run(tmp_path / "runs" / "mine"), "dim the lights in the hall"
    by_file = ae.ask(run / "tune" / "student-F16.gguf", text, task=tiny.TASK)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "task.toml").touch()  # a task's folder of that name is no run
    monkeypatch.chdir(tmp_path)
    replies = [ae.ask(run, text), ae.load_run("mine").ask(text), ae.ask("mine", text)]
    assert {(reply.answer, reply.text, reply.tokens) for reply in replies} == {
        (by_file.answer, by_file.text, by_file.tokens)
    }
    assert by_file.answer in load_task(tiny.TASK).answer.choices
    with pytest.raises(InputError, match="of the task 'home_intents', not of 'object_counting'"):
        ae.ask(run, text, task="object_counting")


def test_the_first_accepted_file_of_an_export_answers(labels: Path, tmp_path: Path) -> None:
    assert accepted_file(labels.parent) == labels
    assert str(ae.ask(labels.parent, "q1")) == str(ae.ask(labels, "q1"))
    rejected = tiny.artifact("Q4_0", status="rejected", reason="differs")
    (tmp_path / rejected.file).touch()
    write_student(tmp_path, tiny.student_file(rejected, tiny.artifact("Q8_0")))  # which is not there
    with pytest.raises(InputError, match="none of its files was accepted"):
        ae.ask(tmp_path, "q1")


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_a_blank_question_is_an_error_before_a_model_is_opened(text: str, labels: Path) -> None:
    with pytest.raises(InputError, match="empty"):
        ae.ask(labels, text)
    with pytest.raises(InputError, match="empty"):
        Student(labels.with_name("none.gguf")).ask(text)


def test_a_question_longer_than_the_context_says_by_how_much(labels: Path) -> None:
    with pytest.raises(InputError, match=r"it has 50\d\d tokens, and the context of .* has room for 4096"):
        ae.ask(labels, "q" * 5000)


def test_a_student_of_another_task_is_not_mistaken(labels: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a student of the task 'labels', not of 'home_intents'"):
        ae.ask(labels, "q1", task="home_intents")
    task = load_task("home_intents")
    path = export(tmp_path, instruction=instruction(task, "answer"), choices=task.answer.choices)
    assert ae.ask(path, "q1", task="home_intents").answer in task.answer.choices


def test_what_is_no_tuned_student_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "tune" / "student-F16.gguf").unlink()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("a text")
    for source, said in {
        run: "no tuned student yet",
        tmp_path / "texts": "no model here",
        tmp_path / "texts" / "notes.txt": "not a usable GGUF",
        tmp_path / "none": "no such folder",
        tmp_path / "none.gguf": "no such file",
    }.items():
        with pytest.raises(InputError, match=said):
            ae.ask(source, "q1")

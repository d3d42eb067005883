"""How a student is asked and read: what it is trained to write is what is read back, in every form."""

import pytest

from arte_edge.asking.form import FORMS, Asking, Form, asking_of, instruction
from arte_edge.runtimes.prompt_render import Message, render
from arte_edge.tasks.task import Answer, Example, Task

INTENTS = Answer(kind="choice", choices=("play music", "C", "C++", "set_alarm"))
REASONS = "It names a song, so it wants music. <ans>play music</ans>"


def task_of(answer: Answer, *targets: str) -> Task:
    rows = tuple(Example(f"input {i}", target) for i, target in enumerate(targets))
    return Task("t", " Say which intent it is.\n", answer, (), rows, rows)


def asking(form: Form, answer: Answer = INTENTS, *targets: str) -> Asking:
    return Asking.of(task_of(answer, *targets or answer.choices), form, len)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", INTENTS.choices)
def test_what_a_student_is_trained_to_write_is_read_as_its_answer(form: Form, target: str) -> None:
    how = asking(form)
    assert how.read(how.completion(target)) == target
    assert how.read(how.completion(target, REASONS)) == target


def test_each_form_has_its_order() -> None:
    assert asking("answer").completion("C", REASONS) == "C"
    assert asking("answer-first").completion("C", REASONS) == ("<ans>C</ans> It names a song, so it wants music.")
    assert asking("reasoning-first").completion("C", REASONS) == ("It names a song, so it wants music. <ans>C</ans>")


def test_an_answer_in_tags_is_read_in_the_bare_form_too_and_a_bare_one_only_there() -> None:
    assert asking("answer").read("It is <ans>C</ans> because") == "C"
    assert asking("answer-first").read("C") is None
    assert asking("answer").read("\nC++\nand so on") == "C++"
    assert asking("answer").read("I think it is C") is None


def test_of_two_tagged_answers_the_first_counts_where_it_comes_first_and_the_last_where_it_comes_last() -> None:
    text = "<ans>C</ans> rather than <ans>C++</ans>"
    assert asking("answer-first").read(text) == "C"
    assert asking("reasoning-first").read(text) == "C++"


def test_an_answer_with_a_line_break_is_whole() -> None:
    text = Answer(kind="text", exact=True)
    assert asking("answer", text, "a\nb").read("a\nb") == "a\nb"
    assert asking("answer", text, "ab").read("ab\nmore") == "ab"


def test_the_budget_holds_the_longest_answer_and_reasons_have_their_own() -> None:
    assert asking("answer").answer_tokens == len("play music") + 4
    assert asking("answer", Answer(kind="text"), "x" * 50).answer_tokens == 104
    assert asking("reasoning-first").answer_tokens == 96
    assert asking("reasoning-first", Answer(kind="text"), "x" * 200).answer_tokens == 412


class Model:
    """Renders with its template, one character a token."""

    def __init__(self, template: str) -> None:
        self.chat_template, self.special_tokens = template, dict[str, str]()

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def render(self, messages: list[Message]) -> str:
        return render(self, messages)


TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_a_student_is_read_from_its_own_template(form: Form) -> None:
    from arte_edge.asking.form import with_instruction

    task = task_of(INTENTS, *INTENTS.choices)
    model = Model(with_instruction(TURNS, instruction(task, form), {}))
    found, before = asking_of(model, task)
    assert (found.form, before) == (form, [])


def test_a_model_that_holds_no_instruction_is_given_it() -> None:
    task = task_of(INTENTS, *INTENTS.choices)
    found, before = asking_of(Model(TURNS), task)
    assert found.form == "answer" and before == [{"role": "system", "content": found.instruction}]

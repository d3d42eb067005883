"""How a student is asked and read: what it is trained to write is what is read back, in every form."""

from types import SimpleNamespace

import pytest

from arte_edge.asking.form import FORMS, Asking, Form, asking_of, instruction, with_instruction
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
    task = task_of(INTENTS, *INTENTS.choices)
    model = Model(with_instruction(TURNS, instruction(task, form), {}))
    found, before = asking_of(model, task)
    assert (found.form, before) == (form, [])


def test_a_model_that_holds_no_instruction_is_given_it() -> None:
    task = task_of(INTENTS, *INTENTS.choices)
    found, before = asking_of(Model(TURNS), task)
    assert found.form == "answer" and before == [{"role": "system", "content": found.instruction}]


NASTY = "It's {{ x }} {% if %} {# c #} \\n \\ }} %} #}\nline 2\ttab \"quotes\" 日本 {{{ }}} '+' ~ " + "long " * 2000
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


def rendered(base: str | None, *messages: Message) -> str:
    template = with_instruction(base, NASTY, {})
    return render(SimpleNamespace(chat_template=template, special_tokens={}), messages)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


ANSWER: Message = {"role": "assistant", "content": "A"}
OWN: Message = {"role": "system", "content": "My own words."}


@pytest.mark.parametrize("base", [CHATML, NO_SYSTEM, None])
def test_a_bare_message_gets_the_instruction_once_and_unchanged(base: str | None) -> None:
    for messages in ([user("Q?")], [user("Q?"), ANSWER, user("R?")]):
        text = rendered(base, *messages)
        assert text.count(NASTY) == 1 and text.index(NASTY) < text.index("Q?")


@pytest.mark.parametrize("base", [CHATML, NO_SYSTEM, None])
def test_a_callers_own_system_text_takes_its_place(base: str | None) -> None:
    text = rendered(base, OWN, user("Q?"))
    assert "My own words." in text and NASTY not in text and "Q?" in text


def test_with_a_system_turn_the_text_is_what_the_base_makes_of_the_same_system_text() -> None:
    model = SimpleNamespace(chat_template=CHATML, special_tokens={})
    assert rendered(CHATML, user("Q?")) == render(model, [{"role": "system", "content": NASTY}, user("Q?")])


def test_a_template_without_system_turn_has_it_in_the_first_user_turn() -> None:
    assert rendered(NO_SYSTEM, user("Q?")).startswith(f"<|user|>{NASTY}\n\nQ?\n")
    assert "<|system|>" not in rendered(NO_SYSTEM, OWN, user("Q?"))


def test_a_model_without_template_gets_plain_text() -> None:
    assert rendered(None, user("Q?"), ANSWER, user("R?")).endswith(
        "\n\nQuestion: Q?\nAnswer:\nA\n\nQuestion: R?\nAnswer:\n"
    )

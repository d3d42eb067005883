"""An instruction in a chat template: a bare message is enough, a caller's own system text still works."""

from types import SimpleNamespace as Model

import pytest

from arte_edge.asking.form import with_instruction
from arte_edge.runtimes.prompt_render import Message, render

NASTY = "It's {{ x }} {% if %} {# c #} \\n \\ }} %} #}\nline 2\ttab \"quotes\" 日本 {{{ }}} '+' ~ " + "long " * 2000
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


def rendered(base: str | None, *messages: Message) -> str:
    template = with_instruction(base, NASTY, {})
    return render(Model(chat_template=template, special_tokens={}), messages)


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
    model = Model(chat_template=CHATML, special_tokens={})
    assert rendered(CHATML, user("Q?")) == render(model, [{"role": "system", "content": NASTY}, user("Q?")])


def test_a_template_without_system_turn_has_it_in_the_first_user_turn() -> None:
    assert rendered(NO_SYSTEM, user("Q?")).startswith(f"<|user|>{NASTY}\n\nQ?\n")
    assert "<|system|>" not in rendered(NO_SYSTEM, OWN, user("Q?"))


def test_a_model_without_template_gets_plain_text() -> None:
    assert rendered(None, user("Q?"), ANSWER, user("R?")).endswith(
        "\n\nQuestion: Q?\nAnswer:\nA\n\nQuestion: R?\nAnswer:\n"
    )

from __future__ import annotations

import pytest

from arte_edge.export.chat import Chat
from arte_edge.export.turns import Turns, read_turns
from arte_edge.runtimes.prompt_render import Message

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The forms of Llama 3, Gemma and Phi-3, written short.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DATED = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BOS = {"bos_token": "<bos>"}
CHATS = {
    "chatml": Chat(CHATML),
    "llama 3": Chat(LLAMA3, BOS, adds_bos=True),
    "llama 3, dated": Chat(DATED, BOS, adds_bos=True),
    "gemma": Chat(GEMMA, BOS, adds_bos=True),
    "phi 3": Chat(PHI3),
    "a begin token that only the template writes": Chat(LLAMA3, BOS),
}
SYSTEM: Message = {"role": "system", "content": "Answer in one word."}
TALK: list[Message] = [
    {"role": "user", "content": "Is 4 even? {{ braces }}"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And 7?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "日本語 🙂"},
]


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("messages", [TALK[:1], TALK[:3], TALK, [SYSTEM, *TALK[:1]], [SYSTEM, *TALK]])
def test_the_pieces_make_the_template_s_own_text(name: str, messages: list[Message]) -> None:
    chat = CHATS[name]
    turns = read_turns(chat)
    assert turns is not None
    begin = "<bos>" if chat.adds_bos else ""  # the tokenizer writes it
    assert begin + turns.text(messages) == chat.render(messages)


def test_a_model_without_a_template_has_no_pieces() -> None:
    assert read_turns(Chat(None)) is None


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",  # repeats what was said
        "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}",  # changes it
        "{% for m in messages %}[{{ loop.index }}]{{ m.content }}{% endfor %}>",  # counts the turns
        "{{ raise_exception('never') }}",
    ],
)
def test_a_template_that_is_more_than_pieces_gives_none_rather_than_wrong_ones(template: str) -> None:
    assert read_turns(Chat(template)) is None


def test_a_default_system_message_stays_with_the_first_turn() -> None:
    turns = read_turns(Chat(CHATML))
    assert isinstance(turns, Turns)
    assert "You are helpful" in turns.first and "You are helpful" not in turns.system + turns.next

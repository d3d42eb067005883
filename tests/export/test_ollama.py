import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.asking.form import Asking, with_instruction
from arte_edge.errors import InputError
from arte_edge.export.chat import Chat, TemplateSegments, go_template, modelfile, template_segments
from arte_edge.runtimes.prompt_render import Message
from arte_edge.tasks.task import Answer

from . import go_template as go

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
ASKING = Asking('Name the "intent".', "answer", Answer(kind="text"), 7, ("\n",))
SYSTEM: Message = {"role": "system", "content": "Answer in one word."}
TALK: list[Message] = [
    {"role": "user", "content": "Is 4 even? {{ braces }}"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And 7?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "日本語 🙂"},
]


def test_a_model_without_a_template_has_no_segments() -> None:
    assert template_segments(Chat(None)) is None


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",  # repeats a message
        "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}",  # changes it
        "{% for m in messages %}[{{ loop.index }}]{{ m.content }}{% endfor %}>",  # counts the turns
        "{{ raise_exception('never') }}",
    ],
)
def test_a_template_that_is_more_than_segments_gives_none(template: str) -> None:
    assert template_segments(Chat(template)) is None


def test_a_default_system_message_stays_with_the_first_turn() -> None:
    segments = template_segments(Chat(CHATML))
    assert isinstance(segments, TemplateSegments)
    assert "You are helpful" in segments.first and "You are helpful" not in segments.system + segments.next


def go_data(messages: list[Message]) -> dict[str, Any]:
    """Return what Ollama gives a template that reads .Messages."""
    return {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Modelfile in order, values unquoted (https://docs.ollama.com/modelfile)."""
    line = r'(?P<name>[A-Z]+) (?:"""(?P<block>.*?)"""|(?P<value>[^\n]+))\n|#[^\n]*\n|\n'
    found, at = [], 0
    while at < len(text):
        match = re.compile(line, re.DOTALL).match(text, at)
        assert match, f"not an instruction: {text[at : at + 60]!r}"
        at = match.end()
        name, value = match["name"], match["block"] if match["value"] is None else match["value"]
        if name == "PARAMETER" and value.endswith('"'):
            key, _, quoted = value.partition(" ")
            unquoted = re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), quoted[1:-1])
            value = f"{key} {unquoted}"
        if name:
            found.append((name, value))
    return found


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_ollama_s_template_renders_as_the_model_s_own(name: str, with_system: bool, n: int) -> None:
    chat = CHATS[name]
    messages = [*([SYSTEM] if with_system else []), *TALK[:n]]
    segments = template_segments(chat)
    assert segments is not None
    written = go.execute(go_template(segments), go_data(messages))
    assert ("<bos>" if chat.adds_bos else "") + written == chat.render(messages)


@pytest.mark.parametrize("name", [*CHATS, "none"])
def test_a_bare_question_renders_as_the_student_s_template_does(name: str) -> None:
    base = CHATS.get(name, Chat(None))
    template = with_instruction(base.chat_template, ASKING.instruction, base.special_tokens)
    chat = replace(base, chat_template=template, stops=("<|im_end|>",))
    instructions = parse_modelfile(modelfile(["a.gguf"], chat, ASKING))
    by_name = dict(instructions)
    assert by_name["SYSTEM"] == ASKING.instruction
    bos = "<bos>" if chat.adds_bos else ""
    for system in (by_name["SYSTEM"], None, "My own."):  # Ollama sends SYSTEM unless a caller sends another
        sent = [*([{"role": "system", "content": system}] if system else []), *TALK[:3]]
        asked = sent if system == "My own." else TALK[:3]
        assert bos + go.execute(by_name["TEMPLATE"], go_data(sent)) == chat.render(asked)
    assert [value for name, value in instructions if name == "PARAMETER"] == [
        *("temperature 0", "num_predict 7"),
        *("stop <|im_end|>", "stop \n"),
    ]


def test_the_first_file_is_used() -> None:
    text = modelfile(["a-Q4_K_M.gguf", "a-Q8_0.gguf"], Chat(None))
    assert parse_modelfile(text)[0] == ("FROM", "./a-Q4_K_M.gguf")
    assert "a-Q8_0.gguf" in text


def test_a_model_without_a_template_is_prompted_in_plain_text() -> None:
    template = dict(parse_modelfile(modelfile(["a.gguf"], Chat(None))))["TEMPLATE"]
    data = {"System": "Be brief.", "Prompt": "Hello"}
    plain = Chat(None).render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    assert go.execute(template, data) == plain


def test_a_template_that_cannot_be_translated_is_left_to_ollama() -> None:
    text = modelfile(["a.gguf"], Chat("{% for m in messages %}{{ m.content | upper }}{% endfor %}"))
    assert "TEMPLATE" not in dict(parse_modelfile(text))


def test_three_quotes_in_an_instruction_are_rejected() -> None:
    with pytest.raises(InputError, match="three double quotes"):
        modelfile(["a.gguf"], Chat(None), replace(ASKING, instruction='say """'))


@given(
    system=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=60),
    stop=st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=12),
)
def test_what_is_written_is_read_back(system: str, stop: str) -> None:
    if '"""' in system:
        return
    text = modelfile(["a.gguf"], Chat(None), replace(ASKING, instruction=system, stops=(stop,)))
    found = parse_modelfile(text)
    assert dict(found)["SYSTEM"] == system + " " * system.endswith('"')
    assert found[-1] == ("PARAMETER", f"stop {stop}")

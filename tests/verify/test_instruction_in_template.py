"""An instruction in a chat template renders alike in every program that reads the file, whatever its text holds."""

import shutil
from pathlib import Path

import pytest
from llama_cpp import llama_chat_format
from tiny import TEMPLATE, Make

from arte_edge.asking.form import with_instruction
from arte_edge.runtimes.loader import open_model
from arte_edge.runtimes.prompt_render import Conversation, Message

from .conftest import BOS

pytest.importorskip("xllamacpp")
NASTY = (
    'It\'s {{ x }} {% if %} {# c #} \\n \\ }} %} #}\r\nline 2\ttab "quotes" 日本 🙂 '
    "{{{ }}} '+' ~ {%- -%} \\' \\\\\n\n " + "long " * 2000
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
USER: Message = {"role": "user", "content": " 'Q'? {{ x }}\n\\n"}
TURNS: list[Message] = [USER, {"role": "assistant", "content": "A"}, {"role": "user", "content": "R?"}]
SYSTEM: Message = {"role": "system", "content": "My own {words}."}
CONVERSATIONS = [Conversation(m) for m in ([USER], TURNS, [SYSTEM, USER], [SYSTEM, *TURNS])]
BASES = {"system": TEMPLATE, "no system": NO_SYSTEM, "chatml": llama_chat_format.CHATML_CHAT_TEMPLATE, "none": None}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("format", ["gguf", "genai"])
@pytest.mark.parametrize("text", [NASTY, "Name the intent.\nReply with the answer alone."], ids=["nasty", "usual"])
def test_every_program_renders_what_jinja2_renders(
    format: str, base: str, text: str, with_fields: Make, good: Path, tmp_path: Path
) -> None:
    template = with_instruction(BASES[base], text, {"bos_token": BOS})
    if format == "gguf":
        path = with_fields({"tokenizer.chat_template": template.encode()})
    else:
        path = shutil.copytree(good, tmp_path / "copy")
        (path / "chat_template.jinja").write_text(template, "utf-8", newline="")
    model = open_model(path, threads=1)
    try:
        expected = [model.render(what.messages) for what in CONVERSATIONS]
        rows = model.renderings(CONVERSATIONS)
    finally:
        model.close()
    assert len(rows) == (2 if format == "gguf" else 1)
    assert text.strip() in expected[0] and text.strip() in expected[1] and text not in expected[2]
    for row in rows:
        assert not row.refusal and not row.unable, row.program
        assert [found and found.removeprefix(row.begin) for found in row.texts] == [
            t.removeprefix(row.begin) for t in expected
        ], row.program

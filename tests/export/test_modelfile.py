from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.errors import InputError
from arte_edge.export.chat import Chat
from arte_edge.export.modelfile import Asking, go_template, modelfile
from arte_edge.export.turns import read_turns
from arte_edge.runtimes.prompt_render import Message


def load(name: str) -> ModuleType:
    """Load a module that lies beside this one; the tests are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


go: Any = load("go_template")
cases: Any = load("test_turns")


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


@pytest.mark.parametrize("name", cases.CHATS)
@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_ollama_s_template_writes_what_the_model_s_own_does(name: str, with_system: bool, n: int) -> None:
    chat = cases.CHATS[name]
    messages = [*([cases.SYSTEM] if with_system else []), *cases.TALK[:n]]
    turns = read_turns(chat)
    assert turns is not None
    written = go.execute(go_template(turns), go_data(messages))
    assert ("<bos>" if chat.adds_bos else "") + written == chat.render(messages)


def test_a_tailored_student_is_asked_as_in_training() -> None:
    chat = Chat(cases.CHATML, stops=("<|im_end|>",))
    asking = Asking("Name the intent.", "Question: ", "Let's think step by step.", ("\nQuestion:",))
    instructions = parse_modelfile(modelfile(["a.gguf"], chat, asking=asking, sampling={"temperature": 0.0}))
    by_name = dict(instructions)
    asked = [{"role": "system", "content": by_name["SYSTEM"]}, {"role": "user", "content": "lights on"}]
    trained = [asked[0], {"role": "user", "content": "Question: lights on"}]
    written = go.execute(by_name["TEMPLATE"], go_data(asked))
    assert written == chat.render(trained, "Let's think step by step.")
    assert [value for name, value in instructions if name == "PARAMETER"] == [
        "temperature 0",
        "stop <|im_end|>",
        "stop \nQuestion:",
    ]


def test_the_first_file_is_the_one_that_is_used() -> None:
    text = modelfile(["a-Q4_K_M.gguf", "a-Q8_0.gguf"], Chat(None))
    assert parse_modelfile(text)[0] == ("FROM", "./a-Q4_K_M.gguf")
    assert "# Other files of the same student: a-Q8_0.gguf" in text


def test_a_model_without_a_template_is_asked_in_plain_text() -> None:
    template = dict(parse_modelfile(modelfile(["a.gguf"], Chat(None))))["TEMPLATE"]
    said = {"System": "Be brief.", "Prompt": "Hello"}
    plain = Chat(None).render(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    )
    assert go.execute(template, said) == plain


def test_a_template_that_cannot_be_translated_is_left_to_ollama() -> None:
    text = modelfile(["a.gguf"], Chat("{% for m in messages %}{{ m.content | upper }}{% endfor %}"))
    assert "TEMPLATE" not in dict(parse_modelfile(text))


def test_three_quotes_in_a_system_message_are_refused() -> None:
    with pytest.raises(InputError, match="three double quotes"):
        modelfile(["a.gguf"], Chat(None), asking=Asking(system='say """'))


@given(
    system=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=60),
    stop=st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=12),
)
def test_what_is_written_is_read_back(system: str, stop: str) -> None:
    if '"""' in system:
        return
    text = modelfile(["a.gguf"], Chat(None), asking=Asking(system=system, stops=(stop,)))
    found = parse_modelfile(text)
    if system:
        assert dict(found)["SYSTEM"] == system + " " * system.endswith('"')
    assert found[-1] == ("PARAMETER", f"stop {stop}")

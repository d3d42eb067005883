"""Messages become the one text that is hashed and decoded, in the model's own template."""

import json
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from arte_edge.errors import InputError
from arte_edge.runtimes.completion import Engine
from arte_edge.runtimes.prompt_render import CHAT_JSON, CHAT_JSON_NEW_TURN, Conversation, applied, render

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello <b> é"}
ANSWER = {"role": "assistant", "content": "So"}
SYSTEM_ROLE = {"role": "system"}
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass
class Templated:
    chat_template: str | None
    special_tokens: dict[str, str] = field(default_factory=lambda: {"bos_token": "<s>", "eos_token": "</s>"})


def rendered(template: str | None, *messages: Any, prefill: str = "", plain: bool = False) -> str:
    return render(cast(Engine, Templated(template)), messages, prefill, plain=plain)


def test_a_model_gets_its_own_template_if_it_has_one_and_then_the_prefill() -> None:
    assert rendered(None, SYSTEM, USER, prefill="So") == "Be brief.\n\nHello <b> é\nSo"
    text = rendered(CHATML, SYSTEM, USER, prefill="So")
    assert text == "<|system|>Be brief.</s><|user|>Hello <b> é</s><|assistant|>So"
    assert rendered(CHATML, USER, plain=True) == "Hello <b> é\n"


def test_a_server_that_renders_itself_gets_a_canonical_document() -> None:
    text = rendered(CHAT_JSON, SYSTEM, USER, prefill="So")
    assert json.loads(text) == {"messages": [SYSTEM, USER, {"role": "assistant", "content": "So"}]}
    assert text == rendered(CHAT_JSON, dict(reversed(SYSTEM.items())), USER, prefill="So")
    assert json.loads(rendered(CHAT_JSON, USER)) == {"messages": [USER]}
    asked = json.loads(rendered(CHAT_JSON_NEW_TURN, SYSTEM, USER, prefill="So"))
    assert asked["prefill"] == "So" and [m["role"] for m in asked["messages"]] == ["system", "user"]
    assert asked["messages"][1]["content"].startswith(USER["content"]) and "So" in asked["messages"][1]["content"]


SKIPS = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + SKIPS
ESCAPES_IT = "{% for m in messages %}{{ m.content | e }}{% endfor %}"


def test_a_system_text_reaches_a_model_whose_template_refuses_or_skips_that_role() -> None:
    for template in (SKIPS, REFUSES):
        assert rendered(template, SYSTEM, USER) == "<|user|>Be brief.\n\nHello <b> é"
        turns = "<|user|>Be brief.<|assistant|>So<|user|>Hello <b> é"
        assert rendered(template, SYSTEM, ANSWER, USER) == turns
        assert rendered(template, SYSTEM) == "<|user|>Be brief."
        # The words of the system text in another turn do not stand for it.
        assert rendered(template, USER | SYSTEM_ROLE, USER) == "<|user|>Hello <b> é\n\nHello <b> é"
    assert rendered(ESCAPES_IT, {"role": "system", "content": "<a>"}, USER).startswith("&lt;a&gt;Hello")


THINKS = "{{ messages[0].content }}{% if enable_thinking is false %}<think>\n\n</think>{% endif %}"


def test_reasoning_is_kept_from_a_teacher_whose_template_can_or_opens_it() -> None:
    model = cast(Engine, Templated(THINKS))
    assert render(model, [USER], "So") == "Hello <b> éSo"
    assert render(model, [USER], "So", thinking=False) == "Hello <b> é<think>\n\n</think>So"
    always = cast(Engine, Templated("{{ messages[0].content }}<think>\n"))
    assert render(always, [USER], "So", thinking=False) == "Hello <b> é<think>\n\n</think>\n\nSo"
    assert rendered(CHATML, USER) == render(cast(Engine, Templated(CHATML)), [USER], thinking=False)


BROKEN = (
    *("{% for %}", "{{ messages[0].nope.nope }}", "{{ raise_exception('never') }}", "{{ 1 // 0 }}"),
    *("{{ messages + 1 }}", "{% for i in range(10 ** 9) %}{% endfor %}"),
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
)
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
)


@pytest.mark.parametrize("template", BROKEN + ESCAPES)
def test_a_broken_template_is_an_input_error_and_none_leaves_its_sandbox(template: str) -> None:
    with pytest.raises(InputError, match="does not render") as caught:
        rendered(template, USER)
    assert "template = 'none'" in caught.value.hint


def test_a_prompt_does_not_change_at_midnight() -> None:
    assert rendered("{{ strftime_now('%Y-%m-%d') }}", USER) == "2024-07-26"


def test_blocks_are_trimmed_and_loops_can_break_as_templates_expect() -> None:
    template = "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m.role }}{% endfor %}"
    assert rendered(template, USER, USER) == "user"


TOOLS = [{"type": "function", "function": {"name": "f", "description": "<b> & 'é' \u2028", "a": None}}]


@pytest.mark.parametrize(
    "filtered",
    [
        *("tools | tojson", "tools[0] | tojson(indent=4)", "messages | tojson", "(1.5, true) | tojson"),
        *("tools | tojson(ensure_ascii=true)", "tools | tojson(separators=(',', ':'), sort_keys=true)"),
        *("tools | tojson(true, 2)", "messages[0].content | tojson", "'%s' | format(tools | tojson) | e"),
    ],
)
def test_json_is_written_as_transformers_writes_it_for_templates(filtered: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model)
    template = "{{ " + filtered + " }}"
    theirs = tokenizer.apply_chat_template([USER], tools=TOOLS, chat_template=template, tokenize=False)
    assert applied(template, Conversation([USER], TOOLS), {}) == theirs


def test_what_a_template_marks_as_generated_is_printed() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}|{% endgeneration %}{% endfor %}"
    assert rendered(template, SYSTEM, USER) == f"{SYSTEM['content']}|{USER['content']}|"

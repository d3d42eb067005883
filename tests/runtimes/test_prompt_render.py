"""Messages become the one text that is hashed and decoded, in the model's own template."""

import json
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from arte_edge.errors import InputError
from arte_edge.runtimes.completion import Engine
from arte_edge.runtimes.prompt_render import CHAT_JSON, render

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello <b> é"}
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


def test_a_template_that_refuses_a_system_role_has_its_text_in_the_first_turn() -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    assert rendered(template, SYSTEM, USER) == "<|user|>Be brief.\n\nHello <b> é</s><|assistant|>"


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
    template = (
        "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m.role }}{% endfor %}"
    )
    assert rendered(template, USER, USER) == "user"


def test_what_a_template_marks_as_generated_is_printed() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}|{% endgeneration %}{% endfor %}"
    assert rendered(template, SYSTEM, USER) == f"{SYSTEM['content']}|{USER['content']}|"

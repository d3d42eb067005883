"""The programs that run a file render its chat template with engines of their own: what each does must be noticed."""

import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from llama_cpp import Llama, llama_chat_format
from tiny import TEMPLATE, Make, Patch

from arte_edge.runtimes.loader import open_model
from arte_edge.verify.chat_template import check_templates
from arte_edge.verify.check import Check, Thresholds

pytest.importorskip("xllamacpp")
SKIPS = "{% if m.role != 'system' %}{{ m.role + m.content }}{% endif %}{% endfor %}"
QWEN3_LIKE = (
    "{%- for m in messages %}{%- set text = m.content %}{%- if '</think>' in text and not loop.last %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- m.role + text }}{%- endfor %}"
)


def programs(path: Path) -> Check:
    """Return what the gate finds in the programs of one file, which is its own reference here."""
    model = open_model(path, threads=1)
    try:
        found = {check.name: check for check in check_templates(model, model, Thresholds())}
    finally:
        model.close()
    assert found["template"].passed and found["template ids"].passed
    return found["template programs"]


@pytest.fixture
def gguf(with_fields: Make) -> Make:
    return lambda template: programs(with_fields({"tokenizer.chat_template": template.encode()}))


@pytest.fixture
def genai(good: Path, tmp_path: Path) -> Make:
    def check(template: str) -> Check:
        folder = shutil.copytree(good, tmp_path / "copy")
        (folder / "chat_template.jinja").write_text(template, "utf-8")
        return programs(folder)

    return check


@pytest.mark.parametrize("format", ["gguf", "genai"])
def test_a_template_that_all_render_alike_passes_and_the_programs_are_named(
    format: str, request: pytest.FixtureRequest
) -> None:
    check = request.getfixturevalue(format)(TEMPLATE)
    assert check.passed and check.measured == 0
    assert ("llama-cpp-python" in check.note and "xllamacpp" in check.note) or format == "genai"


@pytest.mark.parametrize(
    "expression", ["7 // 2", "2 ** 3", "'aaa'.replace('a', 'b', 1)", "loop.cycle('a', 'b')", "'%05.2f' % 3.14"]
)
def test_a_template_that_llama_cpp_does_not_start_with_is_rejected(gguf: Make, expression: str) -> None:
    template = f"{{% for m in messages %}}{{{{ {expression} }}}}{{{{ m.content }}}}{{% endfor %}}"
    check = gguf(template)
    assert not check.passed and check.measured == 12
    assert "xllamacpp" in check.note and "does not start with this chat template" in check.note


@pytest.mark.parametrize(
    ("format", "template", "shown"),
    [
        ("gguf", TEMPLATE + "{{ [1, none] }}", "[1, None]"),
        ("genai", TEMPLATE + "{{ [1, none] }}", "[1, null]"),
        ("genai", "{% for m in messages %}\n  {{ m.content }}\n{% endfor %}\nend", "11 of 12 conversations"),
        ("genai", TEMPLATE + "{{ 'aaa'.replace('a', 'b', 1) }}", "not at all: Unknown method: replace"),
    ],
)
def test_what_a_program_prints_differently_is_shown(
    format: str, template: str, shown: str, request: pytest.FixtureRequest
) -> None:
    check = request.getfixturevalue(format)(template)
    assert not check.passed
    assert shown in check.note


def test_a_file_is_not_to_blame_for_the_chatml_that_llama_cpp_python_puts_in_place_of_its_own(
    gguf: Make, with_fields: Make, monkeypatch: Patch
) -> None:
    check = gguf(llama_chat_format.CHATML_CHAT_TEMPLATE)
    assert check.passed and check.measured == 0
    assert "as 'chatml' renders" in check.note and "not the file's fault" in check.note
    # Its own formatter for exactly this text forgets to trim.
    check = gguf(llama_chat_format.LLAMA3_INSTRUCT_CHAT_TEMPLATE)
    assert check.passed and "as 'llama-3' renders" in check.note
    path = with_fields({"tokenizer.chat_template": llama_chat_format.CHATML_CHAT_TEMPLATE.encode()})
    prompts: list[bytes] = []
    for settings in ({}, {"chat_format": "chat_template.default"}):  # as the note advises
        model = Llama(str(path), verbose=False, n_ctx=64, **settings)
        monkeypatch.setattr(model, "create_completion", Mock(side_effect=KeyError))
        with pytest.raises(KeyError):
            model.create_chat_completion([{"role": "user", "content": "Hi"}])
        prompts.append(model.detokenize(model.create_completion.call_args.kwargs["prompt"], special=True))
        model.close()
    assert b"system" in prompts[0]
    assert prompts[1] == b"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("system", ["", "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"])
def test_system_texts_are_not_compared_where_the_template_takes_none(gguf: Make, system: str) -> None:
    check = gguf("{% for m in messages %}" + system + SKIPS)
    assert check.passed and "takes no system text" in check.note


def test_a_server_that_crashes_with_this_template_only_is_a_refusal(gguf: Make, monkeypatch: Patch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        ok = bool(command[-1])
        return subprocess.CompletedProcess(command, 0 if ok else -6, '{"program": "xllamacpp 1"}' * ok, "")

    monkeypatch.setattr(subprocess, "run", run)
    check = gguf(TEMPLATE)
    assert not check.passed and "xllamacpp 1 does not start with this chat template" in check.note


def test_an_earlier_think_block_that_a_program_keeps_is_a_remark(genai: Make) -> None:
    check = genai(QWEN3_LIKE)
    assert check.passed and "with an earlier <think> block differently" in check.note


@pytest.mark.parametrize(
    ("format", "template", "program"),
    [
        ("gguf", TEMPLATE + "{{ strftime_now('%d %b %Y') }}", "llama-cpp-python"),
        ("genai", TEMPLATE + "{{ strftime_now('%d %b %Y') }}", "onnxruntime-genai"),
        # As Llama 3.1's: llama.cpp gives the variable, so the date that the template would set is never used.
        ("gguf", TEMPLATE + "{{ date_string | default('26 Jul 2024') }}", "xllamacpp"),
    ],
)
def test_todays_date_is_a_remark(format: str, template: str, program: str, request: pytest.FixtureRequest) -> None:
    check = request.getfixturevalue(format)(template)
    assert check.passed
    assert program in check.note and "today's date, training wrote 2024-07-26" in check.note


def test_a_template_that_renders_no_message_fails_though_both_sides_agree(with_fields: Make) -> None:
    model = open_model(with_fields({"tokenizer.chat_template": b"{{ raise_exception('no') }}"}), threads=1)
    check, *_ = check_templates(model, model, Thresholds())
    model.close()
    assert not check.passed and "does not render" in check.note

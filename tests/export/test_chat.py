from pathlib import Path
from typing import Any

import pytest
from tiny import write_jsons

from arte_edge.export.chat import read_chat

BEGINS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    assert read_chat(tmp_path).chat_template is None
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert read_chat(write_jsons(tmp_path, tokenizer_config={"chat_template": templates})).chat_template == "d"


def test_special_tokens_are_read_in_both_spellings(tmp_path: Path) -> None:
    write_jsons(tmp_path, tokenizer_config={"bos_token": {"content": "<s>"}}, special_tokens_map={"eos_token": "</s>"})
    assert read_chat(tmp_path).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("config", "processor", "adds"),
    [
        ({"bos_token": "<s>"}, BEGINS, True),
        ({"bos_token": "<s>"}, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, BEGINS]}, True),
        ({"bos_token": "<|x|>"}, BEGINS, False),
        ({"bos_token": "<s>"}, None, False),
        ({"bos_token": "<s>", "add_bos_token": True}, None, True),
        ({}, BEGINS, False),
    ],
)
def test_whether_the_tokenizer_writes_the_begin_token(
    tmp_path: Path, config: dict[str, Any], processor: Any, adds: bool
) -> None:
    write_jsons(tmp_path, tokenizer_config=config, tokenizer={"post_processor": processor})
    assert read_chat(tmp_path).adds_bos is adds


def test_stops_are_the_end_tokens_of_all_three_sources(tmp_path: Path) -> None:
    added = [{"id": 5, "content": "<|eot_id|>"}, {"id": 7, "content": "<|stop|>"}, {"id": 9, "content": "<x>"}]
    write_jsons(
        tmp_path,
        tokenizer_config={"eos_token": "</s>"},
        tokenizer={"added_tokens": added},
        generation_config={"eos_token_id": [7]},
    )
    assert read_chat(tmp_path).stops == ("</s>", "<|stop|>", "<|eot_id|>")

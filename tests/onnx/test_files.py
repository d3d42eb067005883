"""Stop tokens and token ids, read from a checkpoint's files."""

from pathlib import Path
from typing import Any

import pytest
from tiny import write_jsons

from arte_edge.errors import InputError
from arte_edge.files import read_json
from arte_edge.onnx.files import FileTokenizer, added_tokens, end_tokens
from arte_edge.transformers_load import load_tokenizer
from arte_edge.verify.tokenizer import hard_strings


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 1}, {7, 8, 2}),
        ({"eos_token_id": 7}, {}, {7, 2}),
        ({}, {"eos_token_id": 9}, {9, 2}),
        ({}, {"text_config": {"eos_token_id": 5}}, {5, 2}),
        ({}, {}, {2}),
    ],
)
def test_stop_tokens_are_those_of_the_generation_config_and_the_tokenizer(
    tmp_path: Path, generation: dict[str, Any], config: dict[str, Any], ends: set[int]
) -> None:
    write_jsons(
        tmp_path,
        generation_config=generation,
        config=config,
        tokenizer={"added_tokens": [{"id": 1, "content": "<s>"}, {"id": 2, "content": "</s>"}]},
        tokenizer_config={"eos_token": {"content": "</s>"}},
    )
    assert end_tokens(tmp_path) == ends


def test_ids_equal_those_of_transformers_with_one_begin_token(tiny_student: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(tiny_student), FileTokenizer(tiny_student)
    for text in ("turn on the light", "  two  spaces\n", "<|im_start|>user\nÄ😀漢<|im_end|>", "", "<|begin|>again"):
        plain = text.removeprefix("<|begin|>")
        assert ours.tokens(text) == theirs(plain)["input_ids"]
        assert ours.text(ours.tokens(text)) == theirs.decode(theirs(plain)["input_ids"], skip_special_tokens=True)
    assert ours.text(ours.tokens("a<|im_end|>"), special=True) == "<|begin|>a<|im_end|>"


def test_broken_files_are_named(tmp_path: Path) -> None:
    assert read_json(tmp_path / "config.json") == {}
    for text in ("{", "[1]", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json"):
            read_json(tmp_path / "config.json")
    for ends in ("x", -2, ["x"]):
        with pytest.raises(InputError, match="eos_token_id"):
            end_tokens(write_jsons(tmp_path, config={}, generation_config={"eos_token_id": ends}))
    none = end_tokens(write_jsons(tmp_path, config={}, generation_config={"eos_token_id": [-1, None]}))
    assert not none, "what some trainers write for none"
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        added_tokens(write_jsons(tmp_path, tokenizer={"added_tokens": [{"id": 1}]}))
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        FileTokenizer(tmp_path)


def test_a_tokenizer_saved_with_a_limit_reads_whole_prompts(tiny_student: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_student)
    long = "turn on the light " * 400
    expected = tokenizer(long)["input_ids"]
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(long, truncation=True, max_length=16, padding="max_length")
    tokenizer.save_pretrained(tmp_path)
    assert '"max_length"' in (tmp_path / "tokenizer.json").read_text("utf-8")
    assert FileTokenizer(tmp_path).tokens(long) == expected
    assert load_tokenizer(tmp_path).backend_tokenizer.encode(long).ids == expected
    assert len(max(hard_strings(()), key=len).split()) > 4096  # the gate would see a runtime that cuts

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Make, change_json, edited_json

from arte_edge.checkpoint import read_config
from arte_edge.errors import InputError
from arte_edge.gguf.convert import convert
from arte_edge.gguf.reader import read_model_header
from arte_edge.gguf.tokenizer import end_tokens, read_tokenizer
from arte_edge.runtimes.llamacpp.runtime import LlamaCppRuntime

# What tokenizers stumble over. No text begins or ends in a way that only a chat template would make.
TEXTS = [
    "",
    " ",
    "   three spaces   and more    ",
    "Hello world, I'll say: it's 1234567 o'clock — ISN'T it? DON'T!",
    "\n\n\tdef main(x):\r\n    return x + 42\n\n\n",
    "3.14159 and 1,000,000 and 2024-05-06 007",
    "Ünïcödé straße, 日本語テキスト, مرحبا بالعالم, привет",
    "🙂🚀👩‍👩‍👧 ½ ² x=1;y=2",
    "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n",
    "CamelCase snake_case HTTPServer x86_64 a/b/c//d",
    "a" * 300,
    "\u0000\u0001\u200b\u00a0\ufeffend",
    "!!!???...,,,;;;:::((([[[{{{",
]
BYTE_LEVEL = dict(
    **{"gpt-2": b"gpt-2", "digits": b"smollm", "qwen2": b"qwen2"},
    **{"llama3": b"llama-bpe", "llama3-merging": b"smaug-bpe", "gpt-4o": b"gpt-4o"},
)


def hf_tokens(checkpoint: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids
    return ids


def changed(checkpoint: Path, out: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a checkpoint with one of its JSON files changed."""
    shutil.copytree(checkpoint, out)
    change_json(out / name, change)
    return out


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_tokens_agree(kind: str, make_checkpoint: Make, llama_tokens: Any, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", kind=kind)
    out = convert(checkpoint, tmp_path / "student.gguf")
    assert read_model_header(out).fields["tokenizer.ggml.pre"].value == BYTE_LEVEL[kind]
    drawn = random.Random(3)
    mixed = ["".join(drawn.choices("ab Z1 9\n\t.,'s!é日🙂", k=40)) for _ in range(40)]
    for text in [*TEXTS, *mixed]:
        assert llama_tokens(out, text) == hf_tokens(checkpoint, text), repr(text)


@pytest.mark.parametrize("kind", ["prefixed", "plain"])
def test_sentencepiece_agrees(kind: str, make_checkpoint: Make, llama_tokens: Any, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", kind=kind)
    out = convert(checkpoint, tmp_path / "student.gguf")
    fields = read_model_header(out).fields
    assert fields["tokenizer.ggml.model"].value == b"llama"
    known = ["The quick brown fox", "What is 12 + 30? The answer is 42.", "HELLO World snake_case", "jumps over"]
    for text in (*known, "日本 🙂 ßtraße\nx", "a" * 50, "two  spaces"):
        assert llama_tokens(out, text) == hf_tokens(checkpoint, text), repr(text)


def test_granite_has_its_own_name_for_the_splitting_of_digits(make_checkpoint: Make, tmp_path: Path) -> None:
    out = convert(make_checkpoint("granite"), tmp_path / "student.gguf")
    assert read_model_header(out).fields["tokenizer.ggml.pre"].value == b"refact"


def test_an_unknown_pre_tokenizer_is_rejected(make_checkpoint: Make, tmp_path: Path) -> None:
    def spoil(tokenizer: dict[str, Any]) -> None:
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += r"|\p{Han}"

    odd = changed(make_checkpoint("qwen2"), tmp_path / "odd", "tokenizer.json", spoil)
    with pytest.raises(InputError, match="has no such pre_tokenizer") as caught:
        convert(odd, tmp_path / "student.gguf")
    assert "--llama-cpp" in caught.value.hint


@pytest.mark.parametrize("step", [{"type": "Lowercase"}, {"type": "NFKC"}])
def test_an_unknown_normalizer_is_rejected(step: Any, make_checkpoint: Make, tmp_path: Path) -> None:
    odd = edited_json(make_checkpoint("qwen2"), tmp_path / "odd", "tokenizer.json", normalizer=step)
    with pytest.raises(InputError, match="normalizer"):
        convert(odd, tmp_path / "student.gguf")


def test_bos_is_added_as_the_tokenizer_does(make_checkpoint: Make, llama_tokens: Any, tmp_path: Path) -> None:
    plain = make_checkpoint("llama")
    fields = read_model_header(convert(plain, tmp_path / "plain.gguf")).fields
    assert fields["tokenizer.ggml.add_bos_token"].value is False  # llama-bpe's own default is to add it
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    adding = edited_json(plain, tmp_path / "adding", "tokenizer.json", post_processor=template)
    out = convert(adding, tmp_path / "adding.gguf")
    assert read_model_header(out).fields["tokenizer.ggml.add_bos_token"].value is True
    assert llama_tokens(out, "Hello")[0] == 1 != llama_tokens(tmp_path / "plain.gguf", "Hello")[0]


def test_special_and_added_tokens_have_their_roles_and_kinds(make_checkpoint: Make, tmp_path: Path) -> None:
    def more(tokenizer: dict[str, Any]) -> None:
        row = tokenizer["added_tokens"][0]
        top = max(tokenizer["model"]["vocab"].values())
        for i, text in enumerate(["<label>", "<|looks_special|>"]):
            tokenizer["added_tokens"].append(row | {"id": top + 1 + i, "content": text, "special": False})

    folder = changed(make_checkpoint("llama"), tmp_path / "more", "tokenizer.json", more)
    fields = read_model_header(convert(folder, tmp_path / "student.gguf")).fields
    tokens, kinds = fields["tokenizer.ggml.tokens"].value, fields["tokenizer.ggml.token_type"].value
    of = dict(zip(tokens, kinds, strict=True))
    assert (of[b"<s>"], of[b"<label>"], of[b"<|looks_special|>"], of[b"a"]) == (3, 4, 3, 1)
    assert tokens[-1].startswith(b"[PAD") and kinds[-1] == 5
    roles = {"bos": 1, "eos": 2, "unknown": 0, "padding": 5}
    assert {role: fields[f"tokenizer.ggml.{role}_token_id"].value for role in roles} == roles


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_llama_cpp_stops_at_every_end_token_that_finds_a_place(
    name: str, make_checkpoint: Make, tmp_path: Path
) -> None:
    # 2 is the tokenizer's own, llama.cpp knows 4 by its text, 3 and 0 get a key, and 5 finds no place.
    folder = edited_json(make_checkpoint("llama"), tmp_path / "ends", name, eos_token_id=[2, 3, 4, 0, 5])
    if name == "config.json":
        (folder / "generation_config.json").unlink()
    runtime = LlamaCppRuntime(convert(folder, tmp_path / "student.gguf"))
    assert runtime.stop_tokens == {0, 2, 3, 4}
    runtime.close()
    files = read_tokenizer(folder, read_config(folder))
    assert end_tokens(files) == ({"eot": 3, "eom": 0}, ("<pad>",))


def test_the_chat_template_of_a_file_comes_first_byte_for_byte(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_checkpoint("llama"), tmp_path / "copy"))
    template = "{% for m in messages %}\n{{ m.content }} é🙂\n{% endfor %}"
    (folder / "chat_template.jinja").write_bytes(template.encode())
    fields = read_model_header(convert(folder, tmp_path / "a.gguf")).fields
    assert fields["tokenizer.chat_template"].value.decode() == template


def unigram(content: dict[str, Any]) -> None:
    content["model"] = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]], "unk_id": 0}


def too_many(content: dict[str, Any]) -> None:
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 5000, "content": "<new>"})


@pytest.mark.parametrize(("change", "named"), [(unigram, "Unigram"), (too_many, "rows")])
def test_other_tokenizers_are_rejected(change: Any, named: str, make_checkpoint: Make, tmp_path: Path) -> None:
    folder = changed(make_checkpoint("llama"), tmp_path / "copy", "tokenizer.json", change)
    with pytest.raises(InputError, match=named):
        convert(folder, tmp_path / "student.gguf")
    assert not (tmp_path / "student.gguf").exists()


def test_a_missing_or_broken_tokenizer_is_rejected(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_checkpoint("llama"), tmp_path / "copy"))
    (folder / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(InputError, match="not readable as JSON"):
        convert(folder, tmp_path / "student.gguf")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json and no tokenizer\.model"):
        convert(folder, tmp_path / "student.gguf")

"""A GGUF becomes a checkpoint with the same tokens and logits, once; a failure leaves nothing."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tiny import Make, Patch
from tokenizers.pre_tokenizers import ByteLevel

from arte_edge.cache import DiskFull
from arte_edge.errors import ArteError, InputError
from arte_edge.gguf.reader import read_model_header
from arte_edge.gguf.to_hf import PROBES, check_tokenizer, checkpoint_folder
from arte_edge.models import LocalModel, resolve


@pytest.fixture
def speaking_gguf(tmp_path: Path) -> Path:
    """A random two-layer Llama in F16 whose tokenizer splits numbers into digits; one merge tempts it."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "12", "ĠT"]
    sizes = {"vocab_size": len(tokens), "context_length": 256, "embedding_length": 32, "block_count": 2}
    heads = {"feed_forward_length": 64, "head_count": 4, "head_count_kv": 2, "rope_dimension_count": 8}
    words = {"token_list": tokens, "token_types": [3] * 3 + [1] * 258, "token_merges": ["1 2", "Ġ T"]}
    kind = {"tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "file_type": 1, "rope_freq_base": 10_000.0}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": False}
    writer = tiny.gguf_writer(tmp_path / "tiny.gguf", **sizes, **heads, **words, **kind, **ids)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return tiny.add_tensors(writer, tiny.llama_shapes(len(tokens), 32, 64, kv=16))


def test_the_checkpoint_has_the_tokens_logits_and_template_of_its_gguf(
    model_cache: Path, speaking_gguf: Path, llama_logits: Make, monkeypatch: Patch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = resolve(str(speaking_gguf))
    steps: list[str] = []
    folder = model.checkpoint(lambda step, *_: steps.append(step))
    assert steps[-1] == "checking the checkpoint"
    assert json.loads((folder / "origin.json").read_text())["sha256"] == model.sha256
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer, read_model_header(speaking_gguf))
    ids = tokenizer("is 12")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["1", "2"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
    with torch.no_grad():
        found = loaded.float()(torch.tensor([ids])).logits[0].numpy()
    expected = llama_logits(speaking_gguf, ids)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999
    assert resolve(str(folder)).folder == folder
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # the second time, no process is started
    assert model.checkpoint() == folder
    assert not list((model_cache / "staging").iterdir())


def test_an_architecture_unknown_to_transformers_is_rejected(model_cache: Path, make_gguf: Make) -> None:
    model = resolve(str(make_gguf(arch="gptzilla")))
    with pytest.raises(InputError, match="gptzilla"):
        model.checkpoint()
    assert not checkpoint_folder(model.name, model.sha256).exists()


@pytest.mark.parametrize(
    ("script", "kind", "said"),
    [
        ("kill -9 $$", ArteError, "lack of memory"),
        (
            "echo x > $4/model.safetensors; echo 'No space left on device' >&2; exit 1",
            DiskFull,
            "disk is full",
        ),
        ("echo chatter >&2; echo 'Boom: it broke' >&2; exit 1", ArteError, "Boom: it broke"),
        ('echo \'{"error": "not so", "hint": "do this"}\'; exit 2', InputError, "not so"),
    ],
)
def test_a_child_that_fails_is_explained_and_leaves_nothing(
    model_cache: Path,
    speaking_gguf: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    script: str,
    kind: Any,
    said: str,
) -> None:
    child = tmp_path / "child"
    child.write_text(f"#!/bin/sh\n{script}\n")
    child.chmod(0o755)
    model = resolve(str(speaking_gguf))
    monkeypatch.setattr(sys, "executable", str(child))
    with pytest.raises(ArteError, match=said) as caught:
        model.checkpoint()
    assert type(caught.value) is kind
    assert not checkpoint_folder(model.name, model.sha256).exists()
    assert not list((model_cache / "staging").iterdir())


def test_a_tokenizer_that_cuts_otherwise_is_refused(speaking_gguf: Path) -> None:
    with pytest.raises(ArteError, match="differently"):
        check_tokenizer(lambda text: {"input_ids": [5] * len(text)}, read_model_header(speaking_gguf))


def test_probes_hold_what_tokenizers_stumble_over() -> None:
    text = "".join(PROBES)
    assert any(c.isdigit() for c in text) and "  " in text and "\r\n" in text and not text.isascii()


@pytest.mark.model
def test_the_real_student_predicts_the_same_in_both_forms(smollm2: LocalModel, llama_logits: Make) -> None:
    from transformers import AutoTokenizer

    folder = smollm2.checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is Paris. The capital of Italy is Rome. 12 + 30 =")["input_ids"]
    found = tiny.hf_logits(folder, ids)
    expected = llama_logits(smollm2.gguf, ids)
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.9
    assert tokenizer.chat_template == read_model_header(smollm2.gguf).chat_template

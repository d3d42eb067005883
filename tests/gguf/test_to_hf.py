"""A GGUF becomes a checkpoint with the same tokens and logits, once; a failure leaves nothing."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from tiny import Make, Patch

from arte_edge.cache import DiskFull
from arte_edge.errors import ArteError, InputError
from arte_edge.gguf.reader import read_model_header
from arte_edge.gguf.to_hf import PROBES, check_tokenizer, checkpoint_folder
from arte_edge.models import LocalModel, resolve

Logits = Callable[[Path, Sequence[int]], NDArray[np.float32]]


def _byte_characters() -> list[str]:
    """Return the 256 printable characters that stand for bytes in a byte-level vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture
def speaking_gguf(tmp_path: Path) -> Path:
    """A random two-layer Llama in F16 whose tokenizer splits numbers into digits; one merge tempts it."""
    import gguf

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_byte_characters(), "12", "ĠT"]
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["1 2", "Ġ T"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    random = np.random.default_rng(3)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (32, 32) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (16, 32) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{layer}.{name}": (64, 32) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down"] = (32, 64)
    for name, shape in shapes.items():
        values = random.normal(scale=0.3, size=shape) + (len(shape) == 1)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32 if len(shape) == 1 else np.float16))
    tiny.finish(writer)
    return path


def test_the_checkpoint_has_the_tokens_logits_and_template_of_its_gguf(
    model_cache: Path, speaking_gguf: Path, llama_logits: Logits, monkeypatch: Patch
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


def test_an_architecture_that_transformers_does_not_know_is_the_users_matter(
    model_cache: Path, make_gguf: Make
) -> None:
    model = resolve(str(make_gguf(arch="gptzilla")))
    with pytest.raises(InputError, match="gptzilla"):
        model.checkpoint()
    assert not checkpoint_folder(model.name, model.sha256).exists()


@pytest.mark.parametrize(
    ("script", "kind", "said"),
    [
        ("kill -9 $$", ArteError, "lack of memory"),
        (
            "echo half > $4/model.safetensors; echo 'No space left on device' >&2; exit 1",
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
    kind: type[ArteError],
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
    def other(text: str) -> dict[str, list[int]]:
        return {"input_ids": [5] * len(text)}

    with pytest.raises(ArteError, match="differently"):
        check_tokenizer(other, read_model_header(speaking_gguf))


def test_probes_hold_what_tokenizers_stumble_over() -> None:
    text = "".join(PROBES)
    assert any(c.isdigit() for c in text) and "  " in text and "\r\n" in text and not text.isascii()


@pytest.mark.model
def test_the_real_student_predicts_the_same_words_in_both_forms(
    smollm2: LocalModel, llama_logits: Logits
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2.checkpoint()
    assert smollm2.gguf is not None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is Paris. The capital of Italy is Rome. 12 + 30 =")["input_ids"]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found = model(torch.tensor([ids])).logits[0].numpy()
    expected = llama_logits(smollm2.gguf, ids)
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.9
    assert tokenizer.chat_template == read_model_header(smollm2.gguf).chat_template

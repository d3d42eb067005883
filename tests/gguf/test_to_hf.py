"""A GGUF becomes a checkpoint with the same tokens and logits, once; a failure leaves nothing."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from gguf import RopeScalingType
from tiny import Make, Patch
from tokenizers.pre_tokenizers import ByteLevel

from arte_edge.cache import DiskFull
from arte_edge.errors import ArteError, InputError
from arte_edge.gguf import rope, to_hf
from arte_edge.gguf.reader import read_model_header
from arte_edge.gguf.to_hf import check_tokenizer, checkpoint_folder
from arte_edge.models import LocalModel, resolve


def write_speaking(path: Path, arch: str = "llama", **scaling: Any) -> Path:
    """Write a random two-layer Llama in F16 whose tokenizer splits numbers into digits; one merge tempts it.

    `scaling`: metadata of the rotary scaling for GGML's writer, or ``divisors``, the tensor of Llama 3.
    """
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "12", "ĠT"]
    sizes = {"vocab_size": len(tokens), "context_length": 512, "embedding_length": 32, "block_count": 2}
    heads = {"feed_forward_length": 64, "head_count": 2, "head_count_kv": 1, "rope_dimension_count": 16}
    words = {"token_list": tokens, "token_types": [3] * 3 + [1] * 258, "token_merges": ["1 2", "Ġ T"]}
    kind = {"tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "file_type": 1, "rope_freq_base": 10_000.0}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 0, "add_bos_token": False}
    divisors = scaling.pop("divisors", ())
    writer = tiny.gguf_writer(path, arch, **sizes, **heads, **words, **kind, **ids, **scaling)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    if divisors:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    return tiny.add_tensors(writer, tiny.llama_shapes(len(tokens), 32, 64, kv=16))


@pytest.fixture
def speaking_gguf(tmp_path: Path) -> Path:
    return write_speaking(tmp_path / "tiny.gguf")


YARN = {"rope_scaling_type": RopeScalingType.YARN, "rope_scaling_factor": 4.0, "rope_scaling_orig_ctx_len": 32}
SCALINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rope_scaling_type": RopeScalingType.LINEAR, "rope_scaling_factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    (YARN | {"rope_scaling_attn_factors": 0.5}, {"attention_factor": 0.5 * (1 + 0.1 * math.log(4.0))}),
    ({"divisors": [8.0] * 8}, {"rope_type": "linear", "factor": 8.0}),
    # One or none of the eight waves lies between the bounds: other settings give the same divisors.
    ({"divisors": [1.0] * 4 + [1.7] + [8.0] * 3}, {"rope_type": "llama3", "factor": 8.0}),
    ({"divisors": [1.0] * 4 + [8.0] * 4}, {"rope_type": "llama3", "factor": 8.0}),
]


@pytest.mark.parametrize(("scaling", "settings"), SCALINGS, ids=lambda part: str(part)[:30])
def test_the_rotary_scaling_of_a_gguf_is_restored_and_held_against_llama_cpp(
    scaling: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    header = read_model_header(write_speaking(tmp_path / "tiny.gguf", **scaling))
    found = to_hf._unpack(header, tmp_path / "out", lambda step: None)
    assert found["kl_mean"] < 1e-3 and found["tokens"] == 384
    rope = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert {key: pytest.approx(rope[key]) for key in settings} == settings


def test_a_checkpoint_that_is_another_model_is_rejected(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(to_hf.rope, "restored", lambda header: {})  # what transformers' reader does
    header = read_model_header(write_speaking(tmp_path / "tiny.gguf", divisors=[1.0] * 4 + [8.0] * 4))
    with pytest.raises(ArteError, match="another model"):
        to_hf._unpack(header, tmp_path / "out", lambda step: None)


@pytest.mark.parametrize(("theta", "length"), [(500_000.0, 8192), (10_000.0, 4096)])
def test_llama_3_settings_are_those_it_was_made_with(theta: float, length: int) -> None:
    made = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": length}
    made |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    (tensor,) = rope.tensors({"rope": made, "rope_theta": theta, "head_dim": 64})
    header: Any = SimpleNamespace(path=Path("x.gguf"))
    assert rope._llama3_settings(header, tensor.load(), theta, 131_072) == made


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"divisors": [1.0, 5.0, 2.0, 8.0, 1.0, 8.0, 3.0, 8.0]}, "does not follow"),
        ({"divisors": [0.5] * 8}, "divisors"),
        (YARN | {"divisors": [1.0] * 4 + [8.0] * 4}, "beside a yarn"),
        ({"rope_scaling_attn_factors": 0.5}, "attn_factor"),
    ],
)
def test_a_scaling_that_transformers_lacks_is_refused(scaling: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        rope.restored(read_model_header(write_speaking(tmp_path / "tiny.gguf", **scaling)))


def test_the_checkpoint_has_the_tokens_logits_and_template_of_its_gguf(
    model_cache: Path, speaking_gguf: Path, llama_logits: Make, monkeypatch: Patch, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "heapq.py").write_text("raise SystemExit('the working directory is on the path of the child')")
    monkeypatch.chdir(tmp_path)
    model = resolve(str(speaking_gguf))
    steps: list[str] = []
    folder = model.checkpoint(lambda step, *_: steps.append(step))
    assert steps[-1] == "checking the checkpoint"
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["sha256"] == model.sha256 and origin["held"]["kl_mean"] < 1e-3
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer, read_model_header(speaking_gguf))
    ids = tokenizer("is 12")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["1", "2"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float16}
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
        ("echo x > $5/model.safetensors; echo 'No space left on device' >&2; exit 1", DiskFull, "disk is full"),
        ("echo chatter >&2; echo 'Boom: it broke' >&2; exit 1", ArteError, "Boom: it broke"),
        ('echo \'{"error": "not so", "hint": "do this"}\'; exit 2', InputError, "not so"),
    ],
)
def test_a_child_that_fails_is_explained_and_leaves_nothing(
    model_cache: Path, speaking_gguf: Path, tmp_path: Path, monkeypatch: Patch, script: str, kind: Any, said: str
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


def test_the_child_ends_with_its_parent(speaking_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-P", "-m", "arte_edge.gguf.to_hf", str(speaking_gguf), str(out)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        assert child.stdin is not None
        child.stdin.close()  # as when the parent was killed
        assert child.wait(60) == 130
    assert not out.exists()


def test_a_tokenizer_that_cuts_otherwise_is_refused(speaking_gguf: Path) -> None:
    with pytest.raises(ArteError, match="differently"):
        check_tokenizer(lambda text: {"input_ids": [5] * len(text)}, read_model_header(speaking_gguf))


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

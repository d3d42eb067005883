"""XllamaSpeedModel reads and writes what llama.cpp does, where neither llama-cpp-python nor torch is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arte_edge.models.resolve import LocalModel

pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")

N_VOCAB, WIDTH, HEADS, LAYERS, N_FF = 96, 64, 4, 2, 96

# Each package has a llama.cpp of its own, so a test runs in a process that loads one of them.
WITHOUT = "import sys, json\nfor n in ('llama_cpp', 'torch', 'transformers'): sys.modules[n] = None\n"
OPEN = """
from pathlib import Path
from arte_edge.bench.runtimes.xllamacpp import XllamaSpeedModel
model = XllamaSpeedModel(Path(sys.argv[1]), threads=1, context_tokens=int(sys.argv[2]))
"""


def python(code: str, *args: object) -> Any:
    """Run `code` in a fresh process and return the JSON it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *map(str, args)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in F16."""
    path = tmp_path_factory.mktemp("xllamacpp") / "tiny-F16.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(33 + i) if i < 90 else f"<{i}>" for i in range(N_VOCAB)])
    writer.add_token_types([gguf.TokenType.NORMAL] * 90 + [gguf.TokenType.CONTROL] * (N_VOCAB - 90))
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(N_VOCAB - 1)
    writer.add_vocab_size(N_VOCAB)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    rng = np.random.default_rng(5)
    shapes = {"token_embd": (N_VOCAB, WIDTH), "output": (N_VOCAB, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{name}": (N_FF, WIDTH) for name in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down"] = (WIDTH, N_FF)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.3, shape).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GREEDY = """
def greedy(model, prompt, n):
    model.clear()
    written = [model.read(prompt)]
    while len(written) < n:
        written.append(model.step(written[-1]))
    return written
"""


def test_steps_continue_what_was_read_and_clear_forgets_it(tiny: Path) -> None:
    code = """
prompt = [5, 17, 60, 2, 33, 8, 41]
first = greedy(model, prompt, 12)
again = greedy(model, prompt, 12)
model.clear()
at_once = model.read(prompt + first[:-1])  # the same tokens, read instead of written
model.clear(); model.read(prompt[:3])
in_pieces = model.read(prompt[3:])
other = greedy(model, prompt[::-1], 12)
print(json.dumps([first, again, at_once, in_pieces, other, model.n_vocab]))
"""
    first, again, at_once, in_pieces, other, n_vocab = python(OPEN + GREEDY + code, tiny, 64)
    assert first == again
    assert at_once == first[-1]
    assert in_pieces == first[0]
    assert other != first
    assert len(set(first)) > 3, "the model repeats one token, so the test shows nothing"
    assert n_vocab == N_VOCAB


def test_a_prompt_longer_than_a_batch_is_read_whole(tiny: Path) -> None:
    code = """
prompt = [(7 * i * i + 3 * i) % 90 for i in range(2500)]
model.clear(); whole = model.read(prompt)
model.clear(); model.read(prompt[:1000]); parts = model.read(prompt[1000:])
model.clear(); last = model.read(prompt[2048:])
print(json.dumps([whole, parts, last]))
"""
    whole, parts, last = python(OPEN + code, tiny, 2560)
    assert whole == parts
    assert whole != last, "the first batch does not matter, so the test shows nothing"


def test_a_full_cache_refuses_with_a_message_and_not_a_crash(tiny: Path) -> None:
    code = """
from arte_edge.errors import InputError
messages = []
model.read([1] * 256)
for tokens in ([1], []):
    try: model.read(tokens)
    except InputError as error: messages.append(error.message)
model.clear(); model.read([1] * 256); model.close()
print(json.dumps(messages))
"""
    messages = python(OPEN + code, tiny, 256)
    assert messages == [f"{n} tokens to read, and the context has room for 0" for n in (1, 0)]


def test_facts_say_what_runs(tiny: Path) -> None:
    code = "import dataclasses, xllamacpp\nprint(json.dumps([dataclasses.asdict(model.facts), xllamacpp.__version__]))"
    facts, version = python(OPEN + code, tiny, 4096)
    assert facts["runtime"] == f"xllamacpp {version}"
    assert facts["build_commit"], "which llama.cpp it is"
    assert "CPU" in facts["build"]
    assert (facts["n_batch"], facts["n_ubatch"]) == (2048, 512)
    assert facts["flash_attn"] is True
    assert facts["use_mmap"] is True
    assert any(note.startswith("weights in CPU_Mapped: ") for note in facts["notes"])


def test_llama_cpp_python_writes_the_same_tokens(tiny: Path) -> None:
    pytest.importorskip("llama_cpp")
    code = """
del sys.modules["llama_cpp"]
import os; os.environ["ARTE_EDGE_GGUF_RUNTIME"] = "llama-cpp-python"
from pathlib import Path
from arte_edge.runtimes.llamacpp.bindings import LlamaContext, LlamaModel, Row
weights = LlamaModel(Path(sys.argv[1]))
context = LlamaContext(weights, 1, 256, 1)
class model:
    def clear(): context.clear(); model.n = 0
    def read(tokens):
        rows = [Row(t, model.n + i, 0, True) for i, t in enumerate(tokens)]
        model.n += len(rows)
        return int(context.decode(rows)[-1].argmax())
    def step(token): return model.read([token])
"""
    ask = "print(json.dumps(greedy(model, [5, 17, 60, 2, 33, 8, 41], 48)))"
    assert python(OPEN + GREEDY + ask, tiny, 256) == python(code + GREEDY + ask, tiny)


def test_a_damaged_file_and_a_missing_package_are_named(tiny: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny.read_bytes()[:-5000])
    code = """
from pathlib import Path
from arte_edge.bench.runtimes.xllamacpp import XllamaSpeedModel
from arte_edge.errors import ArteError
try: XllamaSpeedModel(Path(sys.argv[1]), 1, 64)
except ArteError as error: print(json.dumps([type(error).__name__, str(error)]))
"""
    kind, message = python(code, short)
    assert kind == "InputError" and "short.gguf" in message
    kind, message = python("sys.modules['xllamacpp'] = None\n" + code, tiny)
    assert kind == "EngineError" and "arte-edge[xllamacpp]" in message


@pytest.mark.model
def test_smollm2_answers_through_xllamacpp(smollm2: LocalModel) -> None:
    code = """
from arte_edge.runtimes.llamacpp.bindings import LlamaModel
text = LlamaModel(Path(sys.argv[1]), model._library)
prompt = text.tokens("The capital of France is the city of")
print(json.dumps(b"".join(text.piece(t) for t in greedy(model, prompt, 4)).decode()))
"""
    assert "Paris" in python(OPEN + GREEDY + code, smollm2.gguf, 256)

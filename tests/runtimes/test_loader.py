"""Each runtime behind the clock reads and writes what the model says: the same tokens, from one cache."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from tiny import Patch

from arte_edge.errors import InputError
from arte_edge.models.resolve import LocalModel
from arte_edge.runtimes import loader
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.loader import choose_runtime, open_decoder, open_local

PROMPT = [5, 17, 60, 2, 33, 8, 41]

# In a process of its own: llama.cpp's log is ours there, and xllamacpp must not meet it.
CHECK = """
import json, sys
from pathlib import Path
from arte_edge.runtimes.loader import open_decoder
model = open_decoder(Path(sys.argv[1]), threads=1, context_tokens=64, runtime=sys.argv[2])
prompt = json.loads(sys.argv[3])
def after(*parts):
    model.clear()
    for part in parts[:-1]:
        model.step(part) if isinstance(part, int) else model.prefill(part)
    return model.prefill(parts[-1])
whole = after(prompt)
stepped = after(prompt[:3], *prompt[3:-1], prompt[-1:])
again = after(prompt)
other = [after(prompt[i:]) for i in range(1, 6)]
facts = model.facts
model.close()
print(json.dumps([whole, stepped, again, other, facts.runtime, facts.bos]))
"""


def check(path: Path, runtime: str) -> list[Any]:
    command = [sys.executable, "-c", CHECK, str(path), runtime, json.dumps(PROMPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("runtime", "module"), [("llama-cpp-python", "llama_cpp"), ("xllamacpp", "xllamacpp")])
def test_gguf(bench_gguf: Path, runtime: str, module: str) -> None:
    pytest.importorskip(module)
    whole, stepped, again, other, name, bos = check(bench_gguf, runtime)
    assert whole == stepped == again
    assert set(other) != {whole}, "the model says the same whatever it reads, so the test shows nothing"
    assert name.startswith(module)
    if runtime == "llama-cpp-python":
        assert bos == 94


def test_the_cache_types_of_llama_bench_are_taken_and_more_than_the_context_is_refused(bench_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = open_decoder(bench_gguf, threads=1, context_tokens=256, type_k="f32", type_v="bf16")
    assert (model.facts.type_k, model.facts.type_v) == ("f32", "bf16")
    model.prefill([1] * 256)
    with pytest.raises(InputError, match="room for 0"):
        model.prefill([1])
    model.close()


def test_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    words = tiny.chat_tokenizer(tiny.word_tokenizer([str(i) for i in range(96)], unk="0"), eos_token="1")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 4, "max_position_embeddings": 128}
    tiny.save_checkpoint(tmp_path, words, seed=3, dtype="float32", initializer_range=0.4, **sizes)
    whole, stepped, again, other, name, _ = check(tmp_path, "auto")
    assert whole == stepped == again and set(other) != {whole}
    assert name.startswith("transformers ")
    with pytest.raises(InputError, match="made for 128 tokens"):
        open_decoder(tmp_path, threads=1, context_tokens=129)


def test_a_checkpoint_of_a_gguf_file_follows_its_grammars(smollm2: LocalModel) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("transformers")
    engine = open_local(smollm2, kind="transformers")
    assert engine.supports_grammar
    strict = 'root ::= "<ans>" ("yes" | "no") "</ans>"\n'
    for temperature in (0.0, 1.5):
        done = engine.complete([Request(p) for p in ("Is it? ", "Now? ", "So ")], Sampling(temperature, grammar=strict))
        assert {one.text for one in done} <= {"<ans>yes</ans>", "<ans>no</ans>"}
    engine.close()


def _header(n: int, architecture: str = "qwen2") -> Any:
    return SimpleNamespace(parameter_count=n, architecture=architecture)


@pytest.mark.parametrize(
    ("header", "memory_bytes", "able", "chosen"),
    [
        (_header(500_000_000), 16 << 30, "int8", "int8"),
        (_header(135_000_000), 16 << 30, "int8", "llamacpp"),
        (_header(500_000_000, "mamba"), 16 << 30, "int8", "llamacpp"),
        (_header(1_777_000_000), 8_000_000_000, "int8", "int8"),  # with an output matrix of its own, on a laptop
        (_header(8_000_000_000), 16 << 30, "int8", "llamacpp"),
        (_header(500_000_000), 16 << 30, "float32", "transformers"),
        (_header(135_000_000), 16 << 30, "float32", "llamacpp"),
        (_header(500_000_000, "mamba"), 16 << 30, "float32", "llamacpp"),
        (_header(500_000_000), 8_000_000_000, "float32", "llamacpp"),  # too large beside an alignment
        (_header(500_000_000), 16 << 30, "", "llamacpp"),
    ],
)
def test_a_large_teacher_runs_in_the_numbers_that_are_fastest_where_they_fit(
    monkeypatch: Patch, header: Any, memory_bytes: int, able: str, chosen: str
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(loader, "read_model_header", lambda path: header)
    monkeypatch.setattr(loader, "total_bytes", lambda: memory_bytes)
    monkeypatch.setattr("arte_edge.runtimes.transformers.onednn_int8.supported", lambda: able == "int8")
    packs = "arte_edge.runtimes.transformers.onednn_prepack.supports_float32"
    monkeypatch.setattr(packs, lambda: able == "float32")
    monkeypatch.setenv("ARTE_EDGE_DEVICE", "cpu")
    model = LocalModel("m", "0", Path("m.gguf"), None, "Q4_K_M")
    assert loader.teacher_kind(model, "auto") == chosen
    assert loader.teacher_kind(model, "llamacpp") == "llamacpp"


def test_a_runtime_is_chosen_by_the_kind_of_model(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "genai").mkdir()
    (tmp_path / "genai" / "genai_config.json").touch()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "model.onnx").touch()
    found = set()
    monkeypatch.setattr("arte_edge.runtimes.loader.find_spec", lambda name: name in found or None)
    monkeypatch.delenv("ARTE_EDGE_GGUF_RUNTIME", raising=False)
    gguf = tmp_path / "a.gguf"
    assert choose_runtime(gguf) == "llama-cpp-python", "its error says how to install it"
    found.add("xllamacpp")
    assert choose_runtime(gguf) == "xllamacpp"
    found.add("llama_cpp")
    assert choose_runtime(gguf) == "llama-cpp-python"
    monkeypatch.setenv("ARTE_EDGE_GGUF_RUNTIME", "xllamacpp")
    assert choose_runtime(gguf) == "xllamacpp"
    assert choose_runtime(gguf, "llama-cpp-python") == "llama-cpp-python"
    assert choose_runtime(tmp_path / "genai") == "onnxruntime-genai"
    found.add("onnxruntime")
    assert choose_runtime(tmp_path / "genai") == "onnxruntime"
    assert choose_runtime(tmp_path / "plain") == "onnxruntime"
    assert choose_runtime(Path("null:3")) == "null"
    with pytest.raises(InputError, match="not a model folder"):
        choose_runtime(tmp_path)

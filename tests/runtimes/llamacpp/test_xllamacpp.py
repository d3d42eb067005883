"""XllamaRuntime reads and writes what llama.cpp does, where neither llama-cpp-python nor torch is."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

# Each package has a llama.cpp of its own, so a test runs in a process that loads one of them.
WITHOUT = "import sys, json\nfor n in ('llama_cpp', 'torch', 'transformers'): sys.modules[n] = None\n"
OPEN = """
from pathlib import Path
from arte_edge.runtimes.llamacpp.xllamacpp import XllamaRuntime
model = XllamaRuntime(Path(sys.argv[1]), threads=1, context_tokens=int(sys.argv[2]))
"""


def python(code: str, *args: object) -> Any:
    """Run `code` in a fresh process and return the JSON it prints last."""
    command = [sys.executable, "-c", WITHOUT + code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


GREEDY = """
def greedy(model, prompt, n):
    model.clear()
    written = [model.prefill(prompt)]
    while len(written) < n:
        written.append(model.prefill(written[-1:]))
    return written
"""


def test_a_prompt_longer_than_a_batch_is_read_whole(bench_gguf: Path) -> None:
    code = """
prompt = [(7 * i * i + 3 * i) % 90 for i in range(2500)]
model.clear(); whole = model.prefill(prompt)
model.clear(); model.prefill(prompt[:1000]); parts = model.prefill(prompt[1000:])
model.clear(); last = model.prefill(prompt[2048:])
print(json.dumps([whole, parts, last]))
"""
    whole, parts, last = python(OPEN + code, bench_gguf, 2560)
    assert whole == parts
    assert whole != last, "the first batch does not matter, so the test shows nothing"


def test_what_does_not_fit_is_refused_with_a_message_and_not_a_crash(bench_gguf: Path) -> None:
    code = """
from arte_edge.errors import InputError
messages = []
model.prefill([1] * 256)
for tokens in ([1], []):
    try: model.prefill(tokens)
    except InputError as error: messages.append(error.message)
model.clear(); model.prefill([1] * 256); model.close()
try: XllamaRuntime(Path(sys.argv[1]), 1, 5000)
except InputError as error: messages.append(error.message)
print(json.dumps(messages))
"""
    *full, large = python(OPEN + code, bench_gguf, 256)
    assert full == [f"{n} tokens to read, and the context has room for 0" for n in (1, 0)]
    assert "5000" in large and "4096" in large, "more than the model was made for"


def test_facts_say_what_runs_and_what_a_step_costs_beyond_the_model(bench_gguf: Path) -> None:
    code = """
import dataclasses, xllamacpp
before = model.facts.notes
first = model.prefill([5, 17, 60])
model.step(first)
same = model.prefill([2]) == (model.clear(), model.prefill([5, 17, 60, first, 2]))[1]
print(json.dumps([before, same, dataclasses.asdict(model.facts), xllamacpp.__version__]))
"""
    before, same, facts, version = python(OPEN + code, bench_gguf, 4000)
    assert before == [] and same
    assert facts["runtime"] == f"xllamacpp {version}"
    assert facts["build_commit"], "which llama.cpp it is"
    assert "CPU" in facts["build"]
    assert (facts["n_batch"], facts["n_ubatch"]) == (2048, 512)
    (note,) = facts["notes"]
    overhead_ms = float(note.partition(": ")[2].split()[0])
    assert 0 < overhead_ms < 1000


def test_llama_cpp_python_writes_the_same_tokens(bench_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    code = """
del sys.modules["llama_cpp"]
from pathlib import Path
from arte_edge.runtimes.llamacpp.bindings import LlamaContext, LlamaModel, Row
weights = LlamaModel(Path(sys.argv[1]))
context = LlamaContext(weights, 1, 256, 1)
class model:
    def clear(): context.clear(); model.n = 0
    def prefill(tokens):
        rows = [Row(t, model.n + i, 0, True) for i, t in enumerate(tokens)]
        model.n += len(rows)
        return int(context.decode(rows)[-1].argmax())
    def step(token): return model.prefill([token])
"""
    ask = "print(json.dumps(greedy(model, [5, 17, 60, 2, 33, 8, 41], 48)))"
    assert python(OPEN + GREEDY + ask, bench_gguf, 256) == python(code + GREEDY + ask, bench_gguf)


def test_a_damaged_file_and_a_missing_package_are_named(bench_gguf: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(bench_gguf.read_bytes()[:-5000])
    code = """
from pathlib import Path
from arte_edge.runtimes.llamacpp.xllamacpp import XllamaRuntime
from arte_edge.errors import ArteError
try: XllamaRuntime(Path(sys.argv[1]), 1, 64)
except ArteError as error: print(json.dumps([type(error).__name__, str(error)]))
"""
    kind, message = python(code, short)
    assert kind == "InputError" and "short.gguf" in message
    kind, message = python("sys.modules['xllamacpp'] = None\n" + code, bench_gguf)
    assert kind == "EngineError" and "arte-edge[xllamacpp]" in message

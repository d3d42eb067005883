"""A GGUF opens and answers through xllamacpp where neither llama-cpp-python nor torch is installed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arte_edge.runtimes.loader import open_model

from .conftest import Tiny

pytest.importorskip("xllamacpp")

WITHOUT = """
import sys
for name in ("llama_cpp", "torch", "transformers"):
    sys.modules[name] = None
"""
OPEN = """
import json, sys
from pathlib import Path
from arte_edge.runtimes.loader import open_model
model = open_model(Path(sys.argv[1]), threads=1)
"""
SMALL = "from arte_edge.runtimes.llamacpp import xllamacpp\nxllamacpp._TEXT_TOKENS = 100\n"
TEXT = "<|begin|>Is this number even or odd? The answer is"
ASK = f"""
ids = model.tokenize({TEXT!r})
texts = model.generate([{TEXT!r}, "Question: 42"], 24)
stopped = model.generate([{TEXT!r}], 24, stop=(texts[0][3:6],))
messages = [{{"role": "user", "content": "even or odd?"}}]
long = model.generate(["Is this number even or odd? " * 60], 4)
known = dict(
    name=model.name, runtime=model.facts.runtime, quantization=model.quantization, ids=ids, texts=texts,
    stopped=stopped, rendered=model.render(messages), long=long,
    chat=[model.chat([messages], 24)[0], *model.generate([model.render(messages)], 24)],
    chat_stopped=model.chat([messages], 24, stop=("text",)),
)
try: model.logits(ids)
except Exception as error: known["missing"] = [type(error).__name__, error.message, error.hint]
model.close()
print(json.dumps(known))
"""


def python(code: str, *args: Path) -> str:
    """Run `code` in a process of its own: each package has a llama.cpp of its own."""
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "llama.cpp's log buries the progress lines"
    return done.stdout


@pytest.fixture(scope="module")
def answer(tiny: Tiny) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(python(WITHOUT + SMALL + OPEN + ASK, tiny.gguf))
    return found


def test_llama_cpp_python_says_and_writes_the_same(answer: dict[str, Any], tiny: Tiny) -> None:
    assert answer["runtime"].startswith("xllamacpp 20")
    model = open_model(tiny.gguf, threads=1)
    try:
        texts = model.generate([TEXT, "Question: 42"], 24)
        assert answer["texts"] == texts
        assert answer["stopped"] == model.generate([TEXT], 24, stop=(texts[0][3:6],))
        chat, written = answer["chat"]
        assert chat == written and answer["chat_stopped"][0] == chat.partition("text")[0] + "text"
        assert answer["rendered"] == model.render([{"role": "user", "content": "even or odd?"}])
        assert answer["long"] == model.generate(["Is this number even or odd? " * 60], 4)
        assert answer["ids"] == model.tokenize(TEXT)
        assert (answer["name"], answer["quantization"]) == (model.name, model.quantization)
    finally:
        model.close()


def test_logits_need_llama_cpp_python_and_the_error_says_so(answer: dict[str, Any]) -> None:
    kind, message, hint = answer["missing"]
    assert kind == "EngineError" and "logits" in message and "arte-edge[gguf]" in hint


def test_it_can_be_chosen_where_both_are_installed(tiny: Tiny) -> None:
    code = f"import os; os.environ['ARTE_EDGE_GGUF_RUNTIME'] = 'xllamacpp'\n{OPEN}\nprint(model.facts.runtime)"
    assert python(code, tiny.gguf).startswith("xllamacpp 20")
    assert python(f"{OPEN}\nprint(model.facts.runtime)", tiny.gguf).startswith("llama_cpp ")


def test_no_other_runtime_stands_in_for_the_chosen_one(tiny: Tiny) -> None:
    code = f"import os; os.environ['ARTE_EDGE_GGUF_RUNTIME'] = 'llama-cpp-python'\n{WITHOUT}{OPEN}"
    with pytest.raises(AssertionError, match="needs llama-cpp-python"):
        python(code, tiny.gguf)

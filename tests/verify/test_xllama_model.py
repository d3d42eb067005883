"""A GGUF opens, writes and is measured through xllamacpp where neither llama-cpp-python nor torch is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arte_edge.verify.opened import Opened, open_model

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
import numpy as np
from arte_edge.verify.opened import open_model
model = open_model(Path(sys.argv[1]), threads=1)
"""
TEXT = "<|begin|>Is this number even or odd? The answer is"
ASK = f"""
ids = model.tokens({TEXT!r})
np.save(sys.argv[2], model.logits(ids))
texts = model.generate([{TEXT!r}, "Question: 42"], 24)
stopped = model.generate([{TEXT!r}], 24, stop=(texts[0][3:6],))
messages = [{{"role": "user", "content": "even or odd?"}}]
known = dict(
    runtime=model.runtime, ids=ids, texts=texts, stopped=stopped, rendered=model.render(messages),
    added=model.added_tokens, stops=sorted(model.stop_tokens), eos=sorted(model.eos_tokens),
    words=model.words(), n_vocab=model.n_vocab, context=model.context_tokens,
)
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
def answer(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("xllamacpp") / "logits.npy"
    return json.loads(python(WITHOUT + OPEN + ASK, tiny.gguf, out)), out


def test_it_is_xllamacpp_that_runs(answer: tuple[dict[str, Any], Path]) -> None:
    assert answer[0]["runtime"].startswith("xllamacpp 20")


def test_its_logits_are_the_checkpoints(answer: tuple[dict[str, Any], Path], reference: Opened) -> None:
    said, logits = answer
    assert said["ids"] == reference.tokens(TEXT)
    expected = reference.logits(said["ids"])
    np.testing.assert_allclose(np.load(logits), expected, atol=0.02 * float(np.abs(expected).max()))


def test_llama_cpp_python_says_and_writes_the_same(answer: tuple[dict[str, Any], Path], tiny: Tiny) -> None:
    said, _ = answer
    model = open_model(tiny.gguf, threads=1)
    try:
        texts = model.generate([TEXT, "Question: 42"], 24)
        assert said["texts"] == texts
        assert said["stopped"] == model.generate([TEXT], 24, stop=(texts[0][3:6],))
        assert said["rendered"] == model.render([{"role": "user", "content": "even or odd?"}])
        assert said["added"] == list(model.added_tokens)
        assert said["stops"] == sorted(model.stop_tokens)
        assert said["eos"] == sorted(model.eos_tokens)
        assert said["words"] == model.words()
        assert (said["n_vocab"], said["context"]) == (model.n_vocab, model.context_tokens)
    finally:
        model.close()


def test_it_can_be_chosen_where_both_are_installed(tiny: Tiny) -> None:
    code = f"import os; os.environ['ARTE_EDGE_GGUF_RUNTIME'] = 'xllamacpp'\n{OPEN}\nprint(model.runtime)"
    assert python(code, tiny.gguf).startswith("xllamacpp 20")
    assert python(f"{OPEN}\nprint(model.runtime)", tiny.gguf).startswith("llama_cpp ")


def test_no_other_runtime_stands_in_for_the_chosen_one(tiny: Tiny) -> None:
    code = f"import os; os.environ['ARTE_EDGE_GGUF_RUNTIME'] = 'llama-cpp-python'\n{WITHOUT}{OPEN}"
    with pytest.raises(AssertionError, match="needs llama-cpp-python or xllamacpp"):
        python(code, tiny.gguf)

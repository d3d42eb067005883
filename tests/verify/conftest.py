"""A tiny model with a real tokenizer, as checkpoint and as a good F16 GGUF, and functions that damage the GGUF."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny as tiny_models
from numpy.typing import NDArray
from tiny import TEMPLATE, Folders, Make

from arte_edge.gguf.convert import convert
from arte_edge.gguf.reader import Field, read_model_header
from arte_edge.gguf.writer import Tensor, write_gguf
from arte_edge.runtimes.loader import open_model
from arte_edge.runtimes.protocol import Runtime
from arte_edge.tasks.task import Answer, Example, Task
from arte_edge.verify.check import thresholds_for
from arte_edge.verify.gate import Verdict, verify_file
from arte_edge.verify.logits import built_in_prompts

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
BOS, START, END, TEXT_END = SPECIAL = ("<|begin|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
# Texts that the tokenizer learns its merges from.
CORPUS = [
    "the question is whether the answer to the first question is the same as the second one",
    "let us think step by step about what the number 42 means and why it is even or odd",
    "def function(value): return value + 1  # and then some more text about the function",
    "Is this number even or odd? The answer is even. The answer is odd. Question: Answer:",
]


@dataclass(frozen=True)
class Tiny:
    """`checkpoint` is a random two-layer Llama; `gguf` is the same in F16."""

    checkpoint: Path
    gguf: Path


def write_checkpoint(folder: Path, unreachable: str = "", alphabet: Sequence[str] | None = None) -> Path:
    """Write the checkpoint; `unreachable` is a vocabulary entry that no merge makes, `alphabet` as for `bpe`."""
    words = [unreachable] if unreachable else ()
    inner = tiny_models.bpe(CORPUS, SPECIAL, 380, begin=BOS, words=words, alphabet=alphabet)
    return tiny_models.save_checkpoint(
        folder,
        tiny_models.chat_tokenizer(inner, TEMPLATE, bos_token=BOS, eos_token=END),
        seed=3,
        dtype="bfloat16",
        max_position_embeddings=1024,
        initializer_range=0.15,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(END),
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: Folders) -> Tiny:
    folder = tmp_path_factory.mktemp("verify")
    checkpoint = write_checkpoint(folder / "student")
    return Tiny(checkpoint, convert(checkpoint, folder / "student-F16.gguf"))


@pytest.fixture(scope="session")
def reference(tiny: Tiny) -> Iterator[Runtime]:
    """The tiny checkpoint, opened once."""
    model = open_model(tiny.checkpoint)
    yield model
    model.close()


@pytest.fixture(scope="session")
def good(tiny: Tiny, tmp_path_factory: Folders) -> Path:
    """The tiny student as onnxruntime-genai's builder writes it, in 32 bits."""
    pytest.importorskip("onnxruntime_genai")
    from arte_edge.onnx.genai_builder import GenaiSettings, build

    return build(tiny.checkpoint, tmp_path_factory.mktemp("genai") / "fp32", GenaiSettings(precision="fp32"))


def gate(reference: Runtime, artifact: Path, type: str = "F16") -> Verdict:
    return verify_file(reference, artifact, built_in_prompts(reference), thresholds_for(type))


def failed(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.failed}


def note(verdict: Verdict, name: str) -> str:
    return next(check.note for check in verdict.failed if check.name == name)


@pytest.fixture
def with_fields(tiny: Tiny, tmp_path: Path) -> Make:
    """Copy the good GGUF with other metadata: ``with_fields({"tokenizer.ggml.eos_token_id": 1})``."""

    def write(values: Mapping[str, Any], source: Path | None = None) -> Path:
        import gguf

        source = source or tiny.gguf
        found = read_model_header(source)
        fields = {k: f for k, f in found.fields.items() if k != "general.architecture"}
        for key, value in values.items():
            if value is None:
                del fields[key]
            else:
                fields[key] = Field(fields[key].kind, value, fields[key].item_kind)
        data = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(source).tensors}
        tensors = [
            Tensor(name, shape, "F16" if data[name].dtype == np.float16 else "F32", lambda n=name: data[n])  # type: ignore[misc]
            for name, shape in found.shapes.items()
        ]
        return write_gguf(tmp_path / "damaged.gguf", found.architecture, fields, tensors)

    return write


Change = Callable[[NDArray[Any]], NDArray[Any]]


def with_tensor(source: Path, out: Path, name: str, change: Change) -> Path:
    """Copy a GGUF of any type with the raw rows of one tensor changed: ``[n_out, bytes or values]``."""
    import gguf

    shutil.copyfile(source, out)
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == name)
    rows = np.array(tensor.data)
    changed = np.ascontiguousarray(change(rows))
    assert changed.shape == rows.shape and changed.dtype == rows.dtype
    with out.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(changed.tobytes())
    return out


def parity_task(n: int) -> Task:
    """Return a task with `n` validation examples."""
    return Task(
        name="parity",
        description="Is the number even or odd?",
        answer=Answer(kind="choice", choices=("even", "odd")),
        techniques=("Look.",),
        seed=(),
        validation=tuple(Example(f"Is {i} even?", "odd" if i % 2 else "even") for i in range(n)),
    )

"""ONNX folders in the gate: a good one passes, and each way of breaking one is caught."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import change_json

from arte_edge.runtimes.genai import GenaiRuntime
from arte_edge.runtimes.loader import open_model
from arte_edge.runtimes.onnxruntime import OnnxRuntime
from arte_edge.runtimes.protocol import Runtime
from arte_edge.verify.logits import built_in_prompts

from .conftest import failed, gate

pytest.importorskip("onnx")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(good, tmp_path / "copy"))


Damage = Callable[[Path], object]


def test_a_good_genai_folder_passes_in_its_own_runtime(reference: Runtime, good: Path) -> None:
    model = open_model(good)
    assert isinstance(model, GenaiRuntime)
    assert (model.quantization, model.n_vocab) == ("fp32", reference.n_vocab)
    model.close()
    verdict = gate(reference, good, "fp32")
    assert verdict.passed, verdict.reason
    assert verdict.runtimes[1].startswith("onnxruntime-genai")


def test_plain_onnxruntime_reads_and_writes_the_same(reference: Runtime, good: Path) -> None:
    plain, genai = OnnxRuntime(good), GenaiRuntime(good)
    prompts = built_in_prompts(reference)[:2]
    assert plain.generate(prompts, 12) == genai.generate(prompts, 12) == reference.generate(prompts, 12)
    (written,) = genai.generate(prompts[:1], 12)
    assert genai.generate(prompts[:1], 12, [written[4:6]]) == [written[: written.index(written[4:6]) + 2]]
    text = prompts[0]
    assert plain.tokenize(text) == genai.tokenize(text) == reference.tokenize(text)
    assert abs(plain.logits(plain.tokenize(text)) - genai.logits(genai.tokenize(text))).max() < 1e-3
    plain.close()
    genai.close()


def cut_weights(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-5000])


def end_with(token: int) -> Damage:
    return lambda folder: change_json(folder / "genai_config.json", lambda c: c["model"].update(eos_token_id=token))


def zeroed(folder: Path) -> None:
    data = bytearray((folder / "model.onnx.data").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)
    (folder / "model.onnx.data").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "checks", "shown"),
    [
        (cut_weights, {"opens"}, "model.onnx.data"),
        (lambda folder: (folder / "model.onnx.data").unlink(), {"opens"}, "model.onnx.data"),
        (end_with(1), {"stop tokens"}, "never stops at <|im_end|> (2)"),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}"),
            {"template", "template ids"},
            "another model's template",
        ),
        (zeroed, {"kl mean", "kl p99"}, "more than"),
    ],
    ids=["weights cut short", "no weights", "another end", "another template", "zeroed weights"],
)
def test_a_damaged_folder_fails_the_checks_that_it_concerns(
    reference: Runtime, folder: Path, damage: Damage, checks: set[str], shown: str
) -> None:
    damage(folder)
    verdict = gate(reference, folder, "fp32")
    assert checks <= failed(verdict) <= checks | {"top-1 agreement", "perplexity ratio"}
    assert shown in verdict.reason


def test_one_changed_merge_is_caught_although_the_runtime_follows_its_file(reference: Runtime, folder: Path) -> None:
    def swap(data: dict[str, Any]) -> None:
        merges = data["model"]["merges"]
        merges[3], merges[-1] = merges[-1], merges[3]

    change_json(folder / "tokenizer.json", swap)
    assert failed(gate(reference, folder, "fp32")) & {"tokens", "vocabulary", "opens"}

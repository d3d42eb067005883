"""ONNX folders in the gate: a good one passes, and each way of breaking one is caught."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import Folders

from arte_edge.runtimes.genai import GenaiRuntime
from arte_edge.runtimes.loader import open_model
from arte_edge.runtimes.onnxruntime import OnnxRuntime
from arte_edge.runtimes.protocol import Runtime
from arte_edge.verify.gate import Verdict, verify_file
from arte_edge.verify.prompts import built_in_prompts
from arte_edge.verify.thresholds import thresholds_for

from .conftest import Tiny

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnx")


@pytest.fixture(scope="session")
def good(tiny: Tiny, tmp_path_factory: Folders) -> Path:
    """The tiny student as onnxruntime-genai's builder writes it, in 32 bits."""
    from arte_edge.onnx.genai_builder import GenaiSettings, build

    return build(tiny.checkpoint, tmp_path_factory.mktemp("genai") / "fp32", GenaiSettings(precision="fp32"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(good, tmp_path / "copy"))


def gate(reference: Runtime, artifact: Path) -> Verdict:
    return verify_file(reference, artifact, built_in_prompts(reference), thresholds_for("fp32"))


def failed(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.failed}


def change(path: Path, edit: Any) -> None:
    data = json.loads(path.read_text("utf-8"))
    edit(data)
    path.write_text(json.dumps(data), "utf-8")


def test_a_good_genai_folder_passes_in_its_own_runtime(reference: Runtime, good: Path) -> None:
    model = open_model(good)
    assert isinstance(model, GenaiRuntime)
    assert (model.quantization, model.n_vocab) == ("fp32", reference.n_vocab)
    model.close()
    verdict = gate(reference, good)
    assert verdict.passed, verdict.reason
    assert verdict.runtimes[1].startswith("onnxruntime-genai")


def test_plain_onnxruntime_reads_and_writes_the_same(reference: Runtime, good: Path) -> None:
    plain, genai = OnnxRuntime(good), GenaiRuntime(good)
    prompts = built_in_prompts(reference)[:2]
    assert plain.generate(prompts, 12) == genai.generate(prompts, 12) == reference.generate(prompts, 12)
    text = prompts[0]
    assert plain.tokenize(text) == genai.tokenize(text) == reference.tokenize(text)
    assert abs(plain.logits(plain.tokenize(text)) - genai.logits(genai.tokenize(text))).max() < 1e-3
    plain.close()
    genai.close()


def test_a_text_ends_with_a_stop_string(reference: Runtime, good: Path) -> None:
    genai = GenaiRuntime(good)
    (prompt,) = built_in_prompts(reference)[:1]
    (text,) = genai.generate([prompt], 12)
    stop = text[4:6]
    assert genai.generate([prompt], 12, [stop]) == [text[: text.index(stop) + 2]]
    genai.close()


def test_a_truncated_weight_file_is_caught(reference: Runtime, folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-5000])
    verdict = gate(reference, folder)
    assert failed(verdict) == {"opens"} and "model.onnx.data" in verdict.reason


def test_a_missing_weight_file_is_caught(reference: Runtime, folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    assert failed(gate(reference, folder)) == {"opens"}


def test_a_swapped_eos_is_caught(reference: Runtime, folder: Path) -> None:
    change(folder / "genai_config.json", lambda c: c["model"].update(eos_token_id=1))
    verdict = gate(reference, folder)
    assert failed(verdict) == {"stop tokens"}
    assert "never stops at <|im_end|> (2)" in verdict.reason


def test_a_wrong_chat_template_is_caught(reference: Runtime, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    assert {"template", "template ids"} <= failed(gate(reference, folder))


def test_one_changed_merge_is_caught_although_the_runtime_follows_its_file(
    reference: Runtime, folder: Path
) -> None:
    def swap(data: dict[str, Any]) -> None:
        merges = data["model"]["merges"]
        merges[3], merges[-1] = merges[-1], merges[3]

    change(folder / "tokenizer.json", swap)
    assert failed(gate(reference, folder)) & {"tokens", "vocabulary", "opens"}


def test_one_corrupted_stretch_of_weights_is_caught(reference: Runtime, folder: Path) -> None:
    data = bytearray((folder / "model.onnx.data").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)
    (folder / "model.onnx.data").write_bytes(data)
    assert "kl mean" in failed(gate(reference, folder))

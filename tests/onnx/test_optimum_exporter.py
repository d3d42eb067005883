"""The portable layout: found or named environment, the words of transformers 4, and the student in it."""

import functools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Folders, Patch, change_json, hf_logits

from arte_edge.errors import ArteError, InputError
from arte_edge.model_folder import TOKENIZER_FILES
from arte_edge.onnx import optimum_exporter
from arte_edge.onnx.build import find_private_text
from arte_edge.onnx.check import folder_problems, model_file
from arte_edge.onnx.optimum_exporter import build, find_python, for_transformers_4
from arte_edge.pii_scan import this_machine
from arte_edge.runtimes.onnxruntime import OnnxSession

ROOT = Path(__file__).resolve().parents[2]
IDS = [0, *np.random.default_rng(1).integers(3, 400, 50).tolist()]
ROPE_THETA = 50_000.0  # not transformers' default, which a lost key would give


@pytest.fixture(scope="session")
def optimum() -> Path:
    """The Python of an environment with optimum: `make test` makes .venv-optimum in the checkout."""
    with Patch.context() as patch:
        patch.chdir(ROOT)
        try:
            return find_python()
        except ArteError as error:
            pytest.skip(f"optimum needs an environment of its own: {error.message}")


@pytest.fixture(scope="session")
def student(tiny_student: Path, tmp_path_factory: Folders) -> Path:
    folder = shutil.copytree(tiny_student, tmp_path_factory.mktemp("optimum") / "student")
    change_json(folder / "config.json", lambda config: config["rope_parameters"].update(rope_theta=ROPE_THETA))
    return folder


@pytest.fixture(scope="session")
def exported(student: Path, optimum: Path, tmp_path_factory: Folders) -> Callable[[str], Path]:
    """Export `student` as "fp32" or for an instruction set; the same call gives the same folder."""

    @functools.cache
    def make(kind: str) -> Path:
        settings: Any = ("fp32",) if kind == "fp32" else ("int8", kind)
        out = tmp_path_factory.mktemp("exported") / kind
        fp32 = make("fp32") if kind in ("avx2", "avx512") else None
        with Patch.context() as patch:
            patch.setenv("ARTE_EDGE_OPTIMUM_PYTHON", str(optimum))
            return build(student, out, *settings, fp32=fp32)

    return make


def operators(folder: Path) -> Counter[str]:
    import onnx

    return Counter(node.op_type for node in onnx.load(model_file(folder), load_external_data=False).graph.node)


def test_fp32_is_the_student_with_its_rotary_base(exported: Callable[[str], Path], student: Path) -> None:
    session, expected = OnnxSession(exported("fp32"), threads=1), hf_logits(student, IDS)
    assert np.abs(session.logits(IDS) - expected).max() < 1e-4 * np.abs(expected).max()


def test_32_cached_steps_predict_the_same_as_the_whole_text(exported: Callable[[str], Path]) -> None:
    session = OnnxSession(exported("fp32"), threads=1)
    whole = session.logits(IDS)
    session.reset()
    rows = [session.step(IDS[:-32]).copy(), *(session.step([token]).copy() for token in IDS[-32:])]
    assert (np.concatenate(rows).argmax(-1) == whole.argmax(-1)).all()
    kinds = operators(exported("fp32"))
    assert kinds["Shape"] + kinds["Gather"] < 20  # shape arithmetic was removed
    session.logits((IDS * 8)[:400])  # the buffers grow
    np.testing.assert_allclose(session.logits(IDS), whole, atol=1e-4)


@pytest.mark.parametrize("arch", ["arm64", "avx2", "avx512"])
def test_int8_is_smaller_and_still_close(exported: Callable[[str], Path], arch: str) -> None:
    small, whole = exported(arch), exported("fp32")
    assert model_file(small).name == "model_quantized.onnx"
    assert model_file(small).stat().st_size < 0.7 * model_file(whole).stat().st_size
    kinds = operators(small)
    assert kinds["DynamicQuantizeLinear"]
    # Not quantized: in each layer two products of activations and down_proj; and the rotary angles.
    assert kinds["MatMul"] == 7
    close = OnnxSession(small, threads=1).logits(IDS), OnnxSession(whole, threads=1).logits(IDS)
    assert np.corrcoef(close[0].ravel(), close[1].ravel())[0, 1] > 0.95


@pytest.mark.parametrize("kind", ["fp32", "arm64"])
def test_the_folder_has_the_layout_of_transformers_js(
    exported: Callable[[str], Path], student: Path, kind: str
) -> None:
    folder = exported(kind)
    assert folder_problems(folder, student) == []
    assert [path.name for path in (folder / "onnx").iterdir()] == [model_file(folder).name]
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == ROPE_THETA
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (student / name).exists():
            assert (folder / name).read_bytes() == (student / name).read_bytes()
    assert find_private_text(folder, this_machine().private_paths(student, folder)) == {}


def test_a_changed_folder_is_detected(exported: Callable[[str], Path], student: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported("fp32"), tmp_path / "copy")
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert "stop tokens" in "\n".join(folder_problems(folder, student))
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1')
    )
    assert "not in the config" in "\n".join(folder_problems(folder))


def test_a_missing_environment_is_reported_with_the_command_that_creates_it(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARTE_EDGE_OPTIMUM_PYTHON", raising=False)
    monkeypatch.setattr(optimum_exporter, "find_spec", lambda name: None)
    with pytest.raises(ArteError) as caught:
        find_python()
    assert "python3 -m venv .venv-optimum && .venv-optimum/bin/pip install" in caught.value.hint
    assert "'optimum-onnx[onnxruntime]==0.1.0' 'transformers<4.58' torch" in caught.value.hint


@pytest.mark.parametrize(("python", "problem"), [("no-such-python", "cannot be run"), (sys.executable, "optimum-onnx")])
def test_a_named_python_without_optimum_is_rejected(monkeypatch: Patch, python: str, problem: str) -> None:
    monkeypatch.setenv("ARTE_EDGE_OPTIMUM_PYTHON", python)
    with pytest.raises(InputError, match=problem):
        find_python()


def test_a_named_python_that_ends_without_a_word_is_rejected(monkeypatch: Patch, tmp_path: Path) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexit 3\n")
    silent.chmod(0o755)
    monkeypatch.setenv("ARTE_EDGE_OPTIMUM_PYTHON", str(silent))
    with pytest.raises(InputError, match="exit 3"):
        find_python()


def test_the_rotary_embedding_in_the_format_of_transformers_4() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192}
    new: dict[str, Any] = {"model_type": "llama", "dtype": "bfloat16", "rope_parameters": rope}
    assert for_transformers_4(new) == {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192},
    }
    gemma = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    old = for_transformers_4({"rope_parameters": gemma})
    assert old == {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}
    gemma["sliding_attention"]["rope_type"] = "linear"
    with pytest.raises(InputError, match="windowed"):
        for_transformers_4({"rope_parameters": gemma})

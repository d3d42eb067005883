"""Exports of onnxruntime-genai's builder: complete, valid, without paths of this machine, equal to the checkpoint."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import Folders, change_json, edited_json, hf_logits, relative_error

from arte_edge.distill.train.lora_merge import merge, read_adapter
from arte_edge.errors import ArteError, InputError
from arte_edge.model_folder import TOKENIZER_FILES
from arte_edge.models import LocalModel
from arte_edge.onnx.build import find_private_text
from arte_edge.onnx.check import folder_problems, model_file, read_graph
from arte_edge.onnx.files import FileTokenizer
from arte_edge.onnx.genai_builder import GenaiSettings, build
from arte_edge.pii_scan import this_machine
from arte_edge.runtimes.genai import GenaiRuntime
from arte_edge.runtimes.loader import open_model
from arte_edge.runtimes.onnxruntime import OnnxRuntime, OnnxSession
from arte_edge.verify.gate import verify_file
from arte_edge.verify.logits import built_in_prompts

IDS = [0, *np.random.default_rng(0).integers(3, 400, 60).tolist()]
PRECISIONS = ("fp32", "int8", "int4")


@pytest.fixture(scope="session")
def genai(tiny_student: Path, tmp_path_factory: Folders) -> Callable[[str], Path]:
    """Build the tiny student in a precision; the same call gives the same folder."""

    @functools.cache
    def make(precision: str) -> Path:
        settings = GenaiSettings.model_validate({"precision": precision})
        return build(tiny_student, tmp_path_factory.mktemp("genai") / precision, settings)

    return make


def cached(session: OnnxSession, ids: list[int], n_prompt: int) -> NDArray[np.float32]:
    """Read the prompt at once and the rest token by token."""
    session.reset()
    rows = [session.step(ids[:n_prompt]).copy(), *(session.step([token]).copy() for token in ids[n_prompt:])]
    return np.concatenate(rows)


def test_fp32_is_the_student(genai: Callable[[str], Path], tiny_student: Path) -> None:
    session, expected = OnnxSession(genai("fp32"), threads=1), hf_logits(tiny_student, IDS)
    scale = float(np.abs(expected).max())
    assert np.abs(session.logits(IDS) - expected).max() < 1e-4 * scale
    assert np.abs(cached(session, IDS, 20) - expected).max() < 1e-4 * scale


@pytest.mark.parametrize("precision", PRECISIONS)
def test_32_cached_steps_predict_the_same_as_the_whole_text(genai: Callable[[str], Path], precision: str) -> None:
    session = OnnxSession(genai(precision), threads=1)
    whole = session.logits(IDS)
    steps = cached(session, IDS, len(IDS) - 32)
    assert (steps.argmax(-1) == whole.argmax(-1)).all()
    np.testing.assert_allclose(steps, whole, atol=1e-3 * float(np.abs(whole).max()))


def test_the_cache_grows_and_is_cleared(genai: Callable[[str], Path]) -> None:
    session = OnnxSession(genai("int4"), threads=1)
    long = (IDS * 12)[:700]  # more than one chunk, and more than the first buffers hold
    whole = session.logits(long)
    session.reset()
    parts = np.concatenate([session.step(part).copy() for part in (long[:200], long[200:203], long[203:])])
    np.testing.assert_allclose(parts, whole, atol=1e-3 * float(np.abs(whole).max()))
    np.testing.assert_allclose(session.logits(IDS), whole[: len(IDS)], atol=1e-3)


def test_an_impossible_k_quant_is_rejected(tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="odd number of 256"):
        build(tiny_student, tmp_path / "odd", GenaiSettings(block_size=256, algorithm="k_quant"))


def test_quantized_weights_have_the_block_size_of_the_settings(
    genai: Callable[[str], Path], tiny_student: Path, tmp_path: Path
) -> None:
    import onnx

    settings = GenaiSettings(precision="int4", block_size=16, accuracy_level=1)
    model = onnx.load(str(model_file(build(tiny_student, tmp_path / "b16", settings))), load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    attributes = [{row.name: row.i for row in node.attribute} for node in nodes]
    assert nodes
    assert {(row["block_size"], row["accuracy_level"]) for row in attributes} == {(16, 1)}
    assert {row["bits"] for row in attributes} == {4, 8}  # the output and the most sensitive layers get 8
    plain = build(tiny_student, tmp_path / "plain", settings.model_copy(update={"algorithm": "rtn"}))
    graph = onnx.load(str(model_file(plain)), load_external_data=False).graph
    assert {row.i for node in graph.node for row in node.attribute if row.name == "bits"} == {4}
    sizes = [(genai(precision) / "model.onnx.data").stat().st_size for precision in PRECISIONS]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_folder_is_valid_and_passes_onnx_checker(
    genai: Callable[[str], Path], tiny_student: Path, precision: str
) -> None:
    assert folder_problems(genai(precision), tiny_student) == []
    assert read_graph(genai(precision) / "model.onnx").externals
    for name in TOKENIZER_FILES:
        if (tiny_student / name).exists():
            assert (genai(precision) / name).read_bytes() == (tiny_student / name).read_bytes()
    assert find_private_text(genai(precision), this_machine().private_paths(tiny_student, genai(precision))) == {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
    assert not commit or commit[:7].encode() not in (genai(precision) / "model.onnx").read_bytes()


Damage = Callable[[Path], object]


def config(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda folder: change_json(folder / "genai_config.json", lambda data: change(data["model"]))


def cut(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 64)


DAMAGED: dict[str, tuple[Damage, str]] = {
    "weights cut short": (cut("model.onnx.data"), "model.onnx.data has"),
    "weights too long": (
        lambda folder: (folder / "model.onnx.data").open("ab").write(bytes(100_000)),
        "model.onnx.data has",
    ),
    "weights missing": (lambda folder: (folder / "model.onnx.data").unlink(), "is missing"),
    "weights renamed": (lambda folder: (folder / "model.onnx.data").rename(folder / "model.onnx_data"), "is missing"),
    "graph cut short": (cut("model.onnx"), "not a readable ONNX"),
    "tokenizer missing": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "another end token": (config(lambda model: model.update(eos_token_id=1)), "stop tokens [1]"),
    "a layer too many": (config(lambda model: model["decoder"].update(num_hidden_layers=3)), "past_key_values.2"),
    "a cache by another name": (
        config(lambda model: model["decoder"]["inputs"].update(past_key_names="past.%d.key")),
        "past.0.key",
    ),
    "another vocabulary": (config(lambda model: model.update(vocab_size=7)), "the config says 7"),
    "no model": (lambda folder: (folder / "genai_config.json").write_text('{"model": null}'), "model: "),
    "deeply nested": (lambda folder: (folder / "genai_config.json").write_text("[" * 100_000), "nested too deeply"),
    "a size beyond reason": (config(lambda model: model["decoder"].update(head_size=10**30)), "head_size: "),
    "no id": (config(lambda model: model.update(eos_token_id=["x"])), "model.eos_token_id"),
    "no names": (config(lambda model: model["decoder"].update(inputs=True)), "decoder.inputs: "),
    "a file elsewhere": (config(lambda model: model["decoder"].update(filename="../m.onnx")), "filename: "),
    "more heads": (config(lambda model: model["decoder"].update(num_key_value_heads=3)), "says 3"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_folder_is_detected(
    genai: Callable[[str], Path], tiny_student: Path, tmp_path: Path, what: str
) -> None:
    damage, problem = DAMAGED[what]
    folder = shutil.copytree(genai("int4"), tmp_path / "copy")
    damage(folder)
    assert problem in "\n".join(folder_problems(folder, tiny_student))
    if ": " in problem:
        for runtime in (GenaiRuntime, OnnxRuntime):
            with pytest.raises(InputError, match=problem):
                runtime(folder)


def test_an_earlier_export_is_replaced_and_other_folders_are_not(
    genai: Callable[[str], Path], tiny_student: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(genai("fp32"), tmp_path / "out")
    penalty = {"name": "generation_config.json", "repetition_penalty": 1.5}
    student = edited_json(tiny_student, tmp_path / "student", **penalty)
    assert build(student, out, GenaiSettings(precision="int4")) == out
    assert b"MatMulNBits" in (out / "model.onnx").read_bytes()
    # The penalty travels, and greedy answers do not use it.
    assert json.loads((out / "genai_config.json").read_text())["search"]["repetition_penalty"] == 1.5
    prompt = "turn on the light turn on the light turn on"
    assert GenaiRuntime(out).generate([prompt], 16) == OnnxRuntime(out).generate([prompt], 16)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not an ONNX export"):
        build(tiny_student, tmp_path / "mine", GenaiSettings())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "student"]


def test_a_failed_build_is_explained_and_leaves_nothing(tiny_student: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_student, tmp_path / "broken")
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(InputError, match="cut short"):
        build(broken, tmp_path / "out", GenaiSettings())
    with pytest.raises(ArteError, match="model builder failed"):
        build(broken, tmp_path / "out", GenaiSettings(precision="int8"))
    change_json(broken / "config.json", lambda settings: settings.update(architectures=["TinyForCausalLM"]))
    with pytest.raises(InputError, match="family"):
        build(broken, tmp_path / "out", GenaiSettings(precision="int8"))
    weights.unlink()
    with pytest.raises(InputError, match="no model here"):
        build(broken, tmp_path / "out", GenaiSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_export_verify_and_bench_leave_nothing_in_a_users_folders(tiny_student: Path, tmp_path: Path) -> None:
    # Unasked not to, onnxruntime and onnxruntime-genai store a device id and events to send there, except in CI.
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    ours = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") if key in os.environ}
    environment = ours | {"HOME": str(home), "TMPDIR": str(home), "ARTE_EDGE_HOME": str(tmp_path / "cache")}
    model = out / f"{tiny_student.name}-onnx-fp32"
    for words in (
        ["export", tiny_student, "--onnx", "fp32", "-o", out],
        ["verify", tiny_student, model],
        ["bench", model, "-p", "8", "-n", "2", "-r", "1"],
    ):
        command = [sys.executable, "-m", "arte_edge", *map(str, words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert [path for path in home.rglob("*") if path.is_file()] == []


BUILD = """
import sys; from pathlib import Path
from arte_edge.onnx.genai_builder import GenaiSettings, build
from arte_edge.pii_scan import this_machine
build(Path(sys.argv[1]), Path(sys.argv[2]), GenaiSettings())
"""


def working_in(folder: Path) -> list[str]:
    """Return the processes (Linux) whose working folder lies below `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder) in str((process / "cwd").readlink()):
                found.append(process.name)
    return found


def test_a_killed_build_leaves_no_export_and_its_worker_exits(tiny_student: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_process = subprocess.Popen([sys.executable, "-c", BUILD, str(tiny_student), str(out)])
    deadline = time.monotonic() + 120
    while not (logs := list(tmp_path.glob(".out.*.partial/log.txt"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    build_process.send_signal(signal.SIGKILL)
    build_process.wait()
    assert logs  # the builder had started
    while working_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert working_in(tmp_path) == []
    assert not out.exists()
    build(tiny_student, out, GenaiSettings())
    assert folder_problems(out, tiny_student) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.model
def test_smollm2_in_four_bits_predicts_as_in_sixteen(smollm2: LocalModel, tmp_path: Path) -> None:
    checkpoint = smollm2.checkpoint()
    out = build(checkpoint, tmp_path / "int4", GenaiSettings())
    session = OnnxSession(out)
    tokenizer = FileTokenizer(out)
    ids = tokenizer.tokens("The capital of France is Paris. The capital of Germany is")
    whole = session.logits(ids)
    # A model this small loses much with four bits: the right word must be near the top, not first.
    first = [tokenizer.text([int(token)]) for token in whole[-1].argsort()[::-1][:5]]
    assert " Berlin" in first
    expected = hf_logits(checkpoint, ids)
    assert (whole.argmax(-1) == expected.argmax(-1)).mean() > 0.6
    text = [*ids, *session.generate(ids, 32, stop=())]
    steps = cached(session, text, len(ids))
    assert (steps.argmax(-1) == session.logits(text).argmax(-1)).all()


ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_rotary_angles_that_the_builder_gets_wrong_for_llama_are_caught(
    tiny_student: Path, tmp_path: Path, kind: str
) -> None:
    checkpoint = edited_json(tiny_student, tmp_path / "student", rope_parameters={"rope_type": kind, **ROPE})
    reference = open_model(checkpoint)
    out = build(checkpoint, tmp_path / "out", GenaiSettings(precision="fp32"))
    verdict = verify_file(reference, out, built_in_prompts(reference)[:3])
    reference.close()
    assert {"kl mean", "top-1 agreement"} <= {check.name for check in verdict.failed}


def test_a_rope_type_that_the_builder_does_not_know_is_named(tiny_student: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}
    family = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    checkpoint = edited_json(tiny_student, tmp_path / "student", rope_parameters=rope, **family)
    with pytest.raises(InputError, match="rope type 'llama3' in the family Qwen2ForCausalLM"):
        build(checkpoint, tmp_path / "out", GenaiSettings(precision="fp32"))


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_an_adapter_that_the_builder_would_misread_is_merged_before(
    tmp_path: Path, tiny_student: Path, more: dict[str, bool]
) -> None:
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_student, attention_bias=True)
    base = shutil.copytree(tiny_student, tmp_path / "base")
    AutoModelForCausalLM.from_config(config).to(torch.float16).save_pretrained(base)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], **more)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.add_(0.08 * torch.randn_like(tensor))
    model.save_pretrained(tmp_path / "adapter")
    merge(read_adapter(tmp_path / "adapter", base=str(base)), base, tmp_path / "merged", ["turn it on"])
    out = build(tmp_path / "merged", tmp_path / "out", GenaiSettings(precision="fp32"))
    expected, plain = hf_logits(base, IDS, tmp_path / "adapter"), hf_logits(base, IDS)
    error = relative_error(OnnxSession(out, threads=1).logits(IDS), expected)
    assert error < 1e-3 < 5e-3 < relative_error(plain, expected)

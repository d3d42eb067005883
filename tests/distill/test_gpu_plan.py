"""Hours, memory and money of a run on GPUs: published sizes and measured rates, and a plan without any weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import Capture

from arte_edge.cli.main import main
from arte_edge.distill.gpu_plan import Gpus, Shape, call_hours, place, training
from arte_edge.errors import InputError

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
GEMMA_2B = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 256000,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: tiny.Folders) -> dict[str, Path]:
    """Folders with the configuration of a large model and a tiny one's tokenizer, without weights."""
    inner = tiny.bpe([tiny.TEMPLATE, "Is it true? no yes"] * 9, tiny.SPECIAL, 400)
    tokenizer = tiny.chat_tokenizer(
        inner, tiny.TEMPLATE, bos_token="<|begin|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made = {}
    for name, config in (("llama", LLAMA_70B), ("gemma", GEMMA_2B)):
        made[name] = tmp_path_factory.mktemp("plan") / name
        tokenizer.save_pretrained(made[name])
        (made[name] / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def shapes(folders: dict[str, Path]) -> dict[str, Shape]:
    return {name: Shape.of(str(folder)) for name, folder in folders.items()}


def test_the_sizes_are_the_published_ones(shapes: dict[str, Shape]) -> None:
    assert shapes["llama"].n_param == 70_553_706_496
    assert shapes["llama"].kv_bytes_per_token == 327_680
    assert shapes["gemma"].n_param == 2_506_172_416
    # Rank 16 on every linear layer of Llama-3-70B: PEFT counts 207,093,760 parameters.
    assert 16 * shapes["llama"].linear_sides == 207_093_760


def test_a_model_takes_as_few_gpus_as_hold_it_and_its_cache(shapes: dict[str, Shape]) -> None:
    gpus = Gpus(8, "A100-80GB")
    large, small = place(shapes["llama"], gpus, 32, 500), place(shapes["gemma"], gpus, 32, 500)
    assert (large.gpus_each, large.replicas, small.gpus_each, small.replicas) == (4, 2, 1, 8)
    assert large.weights_gb == pytest.approx(35.28, abs=0.01)
    assert large.kv_gb == pytest.approx(32 * 500 * 327_680 / 4 / 1e9)
    assert place(shapes["llama"], Gpus(8, "H200"), 32, 500).gpus_each == 2
    with pytest.raises(InputError, match="do not fit into 1 × A100-80GB"):
        place(shapes["llama"], Gpus(1, "A100-80GB"), 32, 500)
    twice = place(shapes["llama"], Gpus(16, "A100-80GB"), 32, 500)
    assert twice.decode_tokens_per_s == pytest.approx(2 * large.decode_tokens_per_s)


@pytest.mark.parametrize(
    ("n_param", "layers", "parallel", "measured_s"),
    [(14.77e9, 40, 256, 106.8), (32.76e9, 64, 77, 241.9)],
    ids=["Qwen3-14B", "Qwen3-32B"],
)
def test_hours_are_near_those_that_vllm_took_for_a_thousand_conversations(
    n_param: float, layers: int, parallel: int, measured_s: float
) -> None:
    """One A100-80GB, vLLM 0.11.0, ShareGPT: 217,393 tokens read, about 201,500 written (GPUStack's performance lab)."""
    shape = Shape("qwen", int(n_param), layers, 5120, 151936, 2 * layers * 8 * 128 * 2, 0)
    placed = place(shape, Gpus(1, "A100-80GB"), parallel, 320)
    assert 3600 * call_hours(placed, 217_393, 201_500) == pytest.approx(measured_s, rel=0.2)


def test_the_memory_of_trainings(shapes: dict[str, Shape]) -> None:
    gpus = Gpus(8, "A100-80GB", 2.0)
    full = training("tune", shapes["gemma"], gpus, 1, tokens=1e6, at_once=512, lora_rank=None)
    assert full.weights_gb + full.optimizer_gb == pytest.approx(16 * 2.506, abs=0.01)
    shared = training("tune", shapes["gemma"], gpus, 8, tokens=1e6, at_once=512, lora_rank=None)
    assert shared.optimizer_gb - full.optimizer_gb == pytest.approx(4 * 2.506, abs=0.01)
    assert full.hours == pytest.approx(8 * shared.hours)
    dpo = training("align", shapes["llama"], gpus, 1, tokens=1e6, at_once=0, lora_rank=8, reference=True)
    assert dpo.memory_gb == pytest.approx(2 * 70.55 + 16 * 8 * shapes["llama"].linear_sides / 1e9, abs=0.1)
    spread = training(
        "align", shapes["llama"], gpus, 8, tokens=1e6, at_once=0, lora_rank=8, reference=True, spread=True
    )
    assert spread.memory_gb == pytest.approx(dpo.memory_gb / 8 + 4 * 70.55 / 80, abs=0.1)
    probed = training(
        "align", shapes["llama"], gpus, 1, tokens=1e6, at_once=0, lora_rank=8, reference=True, probed=True
    )
    assert probed.memory_gb - dpo.memory_gb == pytest.approx(2 * 70.55, abs=0.1)
    assert full.activations_gb == pytest.approx(512 * (34 * 18 * 2048 + 8 * 256000) / 1e9)


def test_a_run_is_planned_without_weights(folders: dict[str, Path], capfd: Capture) -> None:
    models = ["--teacher", str(folders["llama"]), "--student", str(folders["gemma"]), "--task", "home_intents"]
    plan = ["distill", *models, "--dry-run", "--gpus", "8xa100-80gb", "--gpu-price", "2"]
    server = "teacher.server=http://127.0.0.1:1/v1"  # of its own vLLM, which is not called
    assert main([*plan, "--json", "--set", "train.processes=4", "--set", server]) == 0
    found = json.loads(capfd.readouterr().out)
    held, student = (found["gpus"]["models"][who] for who in ("teacher", "student"))
    assert (held["gpus_each"], held["replicas"], student["replicas"]) == (4, 1, 4)  # one server
    assert found["total"]["gpu_usd"] == pytest.approx(16 * found["total"]["hours"], abs=0.02)
    assert sum(row["hours"] for row in found["stages"]) == pytest.approx(found["total"]["hours"], abs=0.01)
    assert [row["stage"] for row in found["gpus"]["trainings"]] == ["align", "tune"]
    assert any("do not fit into 72 of a GPU's 80 GB" in note for note in found["notes"])
    align = found["gpus"]["trainings"][0]["memory_gb"]
    assert main([*plan, "--json", "--set", "train.processes=4"]) == 0  # the checks hold a copy of their own
    alone = json.loads(capfd.readouterr().out)["gpus"]
    assert alone["models"]["teacher"]["replicas"] == 2
    assert alone["trainings"][0]["memory_gb"] - align == pytest.approx(2 * 70.55, abs=0.1)
    assert main([*plan, "--json", "--set", "train.processes=4", "--set", "teacher.server=vllm"]) == 0
    assert json.loads(capfd.readouterr().out)["gpus"] == alone, "it ends before the trainings"
    assert main([*plan, "--set", 'teacher.server=["http://a:1/v1", "http://b:1/v1"]']) == 2
    assert "leave none of 8" in capfd.readouterr().err
    assert main(plan) == 0
    assert "GPU USD" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--dry-run", "--gpus", "8"], "NxKIND"),
        (["--dry-run", "--gpus", "8xA100"], "A100-80GB"),
        (["--gpus", "8xA100-80GB"], "--dry-run"),
        (["--dry-run", "--gpu-price", "2"], "--gpus"),
        (["--dry-run", "--gpus", "8xH200", "--gpu-price", "-1"], "price"),
    ],
)
def test_a_wrong_flag_is_an_error(flags: list[str], says: str, capfd: Capture) -> None:
    assert main(["distill", *flags]) == 2
    assert says in capfd.readouterr().err


def test_a_folder_without_a_tokenizer_says_so(folders: dict[str, Path], tmp_path: Path, capfd: Capture) -> None:
    shutil.copy(folders["llama"] / "config.json", tmp_path / "config.json")
    given: Any = ["distill", "--teacher", str(tmp_path), "--dry-run", "--gpus", "8xA100-80GB"]
    assert main(given) == 2
    assert "tokenizer" in capfd.readouterr().err

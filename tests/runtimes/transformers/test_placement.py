"""Device and floats on machines that no test has: torch's questions about the hardware are answered by the test."""

from pathlib import Path

import pytest
from tiny import Patch, write_safetensors

from arte_edge.errors import InputError
from arte_edge.runtimes.autotune import Candidate, candidates_here
from arte_edge.runtimes.transformers.model import pick_dtype
from arte_edge.runtimes.transformers.placement import fast_floats, pick_device, training_floats

torch = pytest.importorskip("torch")


def hardware(patch: Patch, kind: str) -> None:
    """Let torch see an Ampere GPU, an older one, Apple's, or none. An older GPU emulates bfloat16."""
    patch.delenv("ARTE_EDGE_DEVICE", raising=False)
    patch.delenv("ARTE_EDGE_DTYPE", raising=False)
    patch.setattr(torch.cuda, "is_available", lambda: kind in ("ampere", "turing"))
    patch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: kind == "ampere" or (kind == "turing" and including_emulation),
    )
    patch.setattr(torch.backends.mps, "is_available", lambda: kind == "apple")


@pytest.mark.parametrize(
    ("kind", "device", "inference", "training", "gemma"),
    [
        ("ampere", "cuda", "bfloat16", "bfloat16", "bfloat16"),
        ("turing", "cuda", "float16", "float16", "float32"),
        ("apple", "mps", "float16", "float32", "float32"),
        ("none", "cpu", "float32", "float32", "float32"),
    ],
)
def test_floats_are_those_that_the_hardware_multiplies_and_the_model_fits(
    kind: str, device: str, inference: str, training: str, gemma: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    hardware(monkeypatch, kind)
    checkpoints = {
        family: write_safetensors(tmp_path / family, {"a": ("F16", [2, 2])}, model_type=family)
        for family in ("llama", "gemma3_text")
    }
    found = pick_device()
    assert found.type == device
    assert fast_floats(found, checkpoints["llama"]) == inference
    assert pick_dtype("auto", found, checkpoints["llama"]) == getattr(torch, inference)
    assert training_floats(checkpoints["llama"]) == training
    assert fast_floats(found, checkpoints["gemma3_text"]) == gemma
    assert training_floats(checkpoints["gemma3_text"]) == gemma
    if device != "cpu":
        ways = candidates_here(1_000, has_file=True, checkpoint=checkpoints["llama"])
        assert ways[1:] == [Candidate("transformers", inference), Candidate("transformers", "float32")]


@pytest.mark.parametrize(("able", "floats"), [({"avx512_bf16"}, "bfloat16"), ({"avx512_f"}, "float32")])
def test_a_frozen_base_has_16_bits_on_a_processor_that_multiplies_them(
    able: set[str], floats: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    hardware(monkeypatch, "none")
    monkeypatch.delenv("ARTE_EDGE_DTYPE", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(able, True))
    checkpoint = write_safetensors(tmp_path / "m", {"a": ("F16", [2, 2])}, model_type="llama")
    assert training_floats(checkpoint, frozen=True) == floats
    assert training_floats(checkpoint) == "float32"
    monkeypatch.setenv("ARTE_EDGE_DTYPE", "float32")
    assert training_floats(checkpoint, frozen=True) == "float32"


def test_a_device_can_be_asked_for_if_it_is_there(monkeypatch: Patch) -> None:
    hardware(monkeypatch, "turing")
    monkeypatch.setenv("ARTE_EDGE_DEVICE", "cpu")
    assert pick_device().type == "cpu" and fast_floats(pick_device()) == "float32"
    for name, why in (("mps", "no such device here"), ("tpu", "unknown")):
        monkeypatch.setenv("ARTE_EDGE_DEVICE", name)
        with pytest.raises(InputError, match=why):
            pick_device()

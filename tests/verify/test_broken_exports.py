"""A deliberately broken export of each kind is caught by the check that names it, and a good one is not."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import Make

from arte_edge.gguf.reader import read_model_header
from arte_edge.runtimes.protocol import Runtime
from arte_edge.verify.gate import Verdict, verify_file
from arte_edge.verify.prompts import built_in_prompts
from arte_edge.verify.thresholds import thresholds_for

from .conftest import HEADS, Tiny, to_gguf, with_tensor


def gate(reference: Runtime, artifact: Path) -> Verdict:
    return verify_file(reference, artifact, built_in_prompts(reference), thresholds_for("F16"))


def failed(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.failed}


def note(verdict: Verdict, name: str) -> str:
    return next(check.note for check in verdict.failed if check.name == name)


def test_a_good_export_passes_every_check(reference: Runtime, tiny: Tiny) -> None:
    verdict = gate(reference, tiny.gguf)
    assert verdict.reason == ""
    assert verdict.passed
    assert {check.name for check in verdict.checks} >= {"tokens", "vocabulary", "template", "kl mean"}
    assert verdict.fidelity is not None and verdict.fidelity.kl_mean < 1e-4


def test_the_reference_is_itself(reference: Runtime, tiny: Tiny) -> None:
    verdict = gate(reference, tiny.checkpoint)
    assert verdict.passed
    assert verdict.fidelity is not None and verdict.fidelity.kl_max == 0.0


def test_a_wrong_chat_template_is_caught(reference: Runtime, with_fields: Make) -> None:
    other = b"{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    verdict = gate(reference, with_fields({"tokenizer.chat_template": other}))
    assert failed(verdict) == {"template", "template ids"}
    assert "<|im_start|>" in note(verdict, "template")


def test_a_template_without_its_bos_is_caught_as_text_only(reference: Runtime, with_fields: Make) -> None:
    # The runtime puts the begin token in front anyway, so the ids are the same.
    source = (reference.chat_template or "").replace("{{ bos_token }}", "")
    verdict = gate(reference, with_fields({"tokenizer.chat_template": source.encode()}))
    assert failed(verdict) == {"template"}


def test_a_missing_chat_template_is_caught(reference: Runtime, with_fields: Make) -> None:
    verdict = gate(reference, with_fields({"tokenizer.chat_template": None}))
    assert failed(verdict) == {"template"}
    assert "artifact has no chat template" in note(verdict, "template")


@pytest.mark.parametrize("token", [0, 1, 3, 40], ids=["bos", "turn-start", "text-end", "a-letter"])
def test_a_swapped_eos_is_caught(reference: Runtime, with_fields: Make, token: int) -> None:
    # llama.cpp knows <|im_end|> by name and still stops there: what the file declares must count.
    verdict = gate(reference, with_fields({"tokenizer.ggml.eos_token_id": token}))
    assert "stop tokens" in failed(verdict)
    assert reference.token_text(token) in note(verdict, "stop tokens")


def test_a_missing_bos_is_caught(reference: Runtime, with_fields: Make) -> None:
    verdict = gate(reference, with_fields({"tokenizer.ggml.add_bos_token": False}))
    assert failed(verdict) == {"tokens", "vocabulary"}
    assert "lacks the begin token '<|begin|>'" in note(verdict, "tokens")


def test_a_special_token_that_became_text_is_caught(reference: Runtime, with_fields: Make) -> None:
    types = list(read_model_header(with_fields({})).fields["tokenizer.ggml.token_type"].value)
    types[1] = 1  # <|im_start|> as NORMAL; llama.cpp corrects the names of end tokens itself
    verdict = gate(reference, with_fields({"tokenizer.ggml.token_type": types}))
    assert "tokens" in failed(verdict)
    assert "special token" in note(verdict, "tokens")


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 1.0])
def test_one_changed_merge_is_caught(reference: Runtime, with_fields: Make, where: float) -> None:
    merges = list(read_model_header(with_fields({})).fields["tokenizer.ggml.merges"].value)
    at = round(where * (len(merges) - 1))
    left, _, right = merges[at].partition(b" ")
    merges[at] = right + b" " + left if left != right else b"! !"
    verdict = gate(reference, with_fields({"tokenizer.ggml.merges": merges}))
    assert "vocabulary" in failed(verdict)
    assert "merge" in note(verdict, "vocabulary")


def test_another_pre_tokenizer_is_caught(reference: Runtime, with_fields: Make) -> None:
    verdict = gate(reference, with_fields({"tokenizer.ggml.pre": b"llama-bpe"}))
    assert "tokens" in failed(verdict)


def unpermuted(rows: NDArray[Any]) -> NDArray[Any]:
    """Undo the interleaving that llama.cpp needs in a head's rows, as a converter that misses it does."""
    halves = rows.reshape(HEADS, rows.shape[0] // HEADS // 2, 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def test_permuted_attention_heads_are_caught(reference: Runtime, tiny: Tiny, tmp_path: Path) -> None:
    broken = with_tensor(tiny.gguf, tmp_path / "heads.gguf", "blk.0.attn_q.weight", unpermuted)
    verdict = gate(reference, broken)
    assert {"kl mean", "kl p99"} <= failed(verdict)
    assert "tokens" not in failed(verdict)


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "blk.0.attn_v.weight", "token_embd.weight"])
def test_one_corrupted_tensor_is_caught(reference: Runtime, tiny: Tiny, tmp_path: Path, name: str) -> None:
    def shuffled(rows: NDArray[Any]) -> NDArray[Any]:
        return np.random.default_rng(0).permutation(rows, axis=0)

    verdict = gate(reference, with_tensor(tiny.gguf, tmp_path / "corrupt.gguf", name, shuffled))
    assert {"kl mean", "kl p99", "top-1 agreement"} <= failed(verdict)


def test_a_tensor_with_values_that_are_not_finite_is_caught(
    reference: Runtime, tiny: Tiny, tmp_path: Path
) -> None:
    def poisoned(rows: NDArray[Any]) -> NDArray[Any]:
        rows[3, 3] = np.nan
        return rows

    verdict = gate(reference, with_tensor(tiny.gguf, tmp_path / "nan.gguf", "blk.1.ffn_up.weight", poisoned))
    assert {"kl mean", "top-1 agreement", "perplexity ratio"} <= failed(verdict)
    assert "not finite" in note(verdict, "kl mean")
    kl = next(check for check in verdict.as_dict()["checks"] if check["name"] == "kl mean")
    assert kl["measured"] is None  # JSON has no infinity


@pytest.mark.parametrize("left", [0.999, 0.5, 0.01])
def test_a_truncated_file_is_caught(reference: Runtime, tiny: Tiny, tmp_path: Path, left: float) -> None:
    broken = tmp_path / "cut.gguf"
    broken.write_bytes(tiny.gguf.read_bytes()[: int(left * tiny.gguf.stat().st_size)])
    verdict = gate(reference, broken)
    assert failed(verdict) == {"opens"}
    assert "cut short" in verdict.reason
    assert str(tmp_path) not in str(verdict.as_dict())  # no path of this machine in student.json


def test_an_adapter_merged_into_a_4_bit_base_is_caught(
    reference: Runtime, tiny: Tiny, tmp_path: Path
) -> None:
    # The classic mistake: the base is loaded in 4 bits for training, and the adapter is merged into that.
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import dequantize, quantize
    from safetensors.torch import load_file, save_file

    merged: dict[str, dict[str, Any]] = {"right": {}, "wrong": {}}
    import torch

    torch.manual_seed(5)
    for name, weight in load_file(tiny.checkpoint / "model.safetensors").items():
        values = weight.float().numpy()
        rounded = dequantize(quantize(values, Type.Q4_0), Type.Q4_0) if values.ndim == 2 else values
        is_adapted = name.endswith(("q_proj.weight", "v_proj.weight"))
        low_rank = torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[-1]) * 0.01
        change = low_rank if is_adapted else torch.zeros_like(weight, dtype=torch.float32)
        merged["right"][name] = (weight.float() + change).to(torch.bfloat16)
        merged["wrong"][name] = (torch.from_numpy(rounded.copy()) + change).to(torch.bfloat16)
    for kind, weights in merged.items():
        shutil.copytree(tiny.checkpoint, tmp_path / kind)
        save_file(weights, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
    from arte_edge.runtimes.loader import open_model

    student = open_model(tmp_path / "right")
    good = gate(student, to_gguf(tmp_path / "right", tmp_path / "right.gguf"))
    bad = gate(student, to_gguf(tmp_path / "wrong", tmp_path / "wrong.gguf"))
    student.close()
    assert good.passed, good.reason
    assert {"kl mean", "kl p99"} <= failed(bad)
    assert "4-bit base" in note(bad, "kl mean")


def test_a_word_that_llama_cpp_alone_takes_for_an_end_is_told_and_not_held_against_the_file(
    tmp_path: Path,
) -> None:
    # Qwen2.5-Coder has "</s>" as an ordinary word, and llama.cpp parses it and stops there by its name.
    from arte_edge.runtimes.loader import open_model

    from .conftest import write_checkpoint

    checkpoint = write_checkpoint(tmp_path / "student", unreachable="</s>")
    model = open_model(checkpoint)
    verdict = gate(model, to_gguf(checkpoint, tmp_path / "F16.gguf"))
    assert verdict.passed, verdict.reason
    tokens = next(check for check in verdict.checks if check.name == "tokens")
    assert "tokenized differently by llama_cpp itself" in tokens.note and "</s>" in tokens.note
    model.close()

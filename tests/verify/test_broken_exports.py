"""A deliberately broken export of each kind is caught by the check that names it, and a good one is not."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import TEMPLATE, Make, Patch, edited

from arte_edge.gguf.convert import convert
from arte_edge.gguf.reader import read_model_header
from arte_edge.results.student_json import FidelityMetrics
from arte_edge.runtimes.loader import open_model
from arte_edge.runtimes.protocol import Runtime
from arte_edge.verify import accuracy
from arte_edge.verify.check import thresholds_for
from arte_edge.verify.gate import Verdict, verify
from arte_edge.verify.logits import task_prompts

from .conftest import Tiny, failed, gate, note, parity_task, with_tensor, write_checkpoint


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


@pytest.mark.parametrize(
    ("fields", "checks", "shown"),
    [
        (
            {"tokenizer.chat_template": b"{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"},
            {"template", "template ids"},
            "<|im_start|>",
        ),
        # The runtime puts the begin token in front anyway, so the ids are the same.
        ({"tokenizer.chat_template": TEMPLATE.replace("{{ bos_token }}", "").encode()}, {"template"}, "BOS"),
        ({"tokenizer.chat_template": None}, {"template"}, "artifact has no chat template"),
        ({"tokenizer.ggml.add_bos_token": False}, {"tokens", "vocabulary"}, "lacks the begin token '<|begin|>'"),
    ],
)
def test_a_changed_field_fails_the_checks_that_it_concerns(
    reference: Runtime, with_fields: Make, fields: dict[str, Any], checks: set[str], shown: str
) -> None:
    verdict = gate(reference, with_fields(fields))
    assert failed(verdict) == checks
    assert shown in verdict.reason


@pytest.mark.parametrize("token", [0, 1, 3, 40], ids=["bos", "turn-start", "text-end", "a-letter"])
def test_a_swapped_eos_is_caught(reference: Runtime, with_fields: Make, token: int) -> None:
    # llama.cpp knows <|im_end|> by name and still stops there: what the file declares must count.
    verdict = gate(reference, with_fields({"tokenizer.ggml.eos_token_id": token}))
    assert "stop tokens" in failed(verdict)
    assert reference.token_text(token) in note(verdict, "stop tokens")


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
    assert "tokens" in failed(gate(reference, with_fields({"tokenizer.ggml.pre": b"llama-bpe"})))


def unpermuted(rows: NDArray[Any], heads: int = 4) -> NDArray[Any]:
    """Undo the interleaving that llama.cpp needs in a head's rows, as a converter that misses it does."""
    halves = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def test_permuted_attention_heads_are_caught(reference: Runtime, tiny: Tiny, tmp_path: Path) -> None:
    name = "heads\udce9.gguf" if Path("/proc").is_dir() else "heads.gguf"  # not UTF-8, where that can be
    verdict = gate(reference, with_tensor(tiny.gguf, tmp_path / name, "blk.0.attn_q.weight", unpermuted))
    assert {"kl mean", "kl p99"} <= failed(verdict)
    assert "tokens" not in failed(verdict)


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "blk.0.attn_v.weight", "token_embd.weight"])
def test_one_corrupted_tensor_is_caught(reference: Runtime, tiny: Tiny, tmp_path: Path, name: str) -> None:
    def shuffled(rows: NDArray[Any]) -> NDArray[Any]:
        return np.random.default_rng(0).permutation(rows, axis=0)

    verdict = gate(reference, with_tensor(tiny.gguf, tmp_path / "corrupt.gguf", name, shuffled))
    assert {"kl mean", "kl p99", "top-1 agreement"} <= failed(verdict)


def test_a_tensor_with_values_that_are_not_finite_is_caught(reference: Runtime, tiny: Tiny, tmp_path: Path) -> None:
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


def test_weights_that_were_rounded_to_4_bits_before_are_caught(reference: Runtime, tiny: Tiny, tmp_path: Path) -> None:
    # The classic mistake: the base is loaded in 4 bits for training, and the adapter is merged into that.
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import dequantize, quantize

    def rounded(tensors: dict[str, Any]) -> None:
        for name, weight in tensors.items():
            if weight.ndim == 2:
                values = dequantize(quantize(weight.float().numpy(), Type.Q4_0), Type.Q4_0)
                tensors[name] = weight.new_tensor(values)

    bad = gate(reference, convert(edited(tiny.checkpoint, tmp_path / "wrong", rounded), tmp_path / "wrong.gguf"))
    assert {"kl mean", "kl p99"} <= failed(bad)
    assert "4-bit base" in note(bad, "kl mean")


def test_a_word_that_llama_cpp_alone_takes_for_an_end_is_told_and_not_held_against_the_file(tmp_path: Path) -> None:
    # Qwen2.5-Coder has "</s>" as an ordinary word, and llama.cpp parses it and stops there by its name.
    checkpoint = write_checkpoint(tmp_path / "student", unreachable="</s>")
    model = open_model(checkpoint)
    verdict = gate(model, convert(checkpoint, tmp_path / "F16.gguf"))
    assert verdict.passed, verdict.reason
    tokens = next(check for check in verdict.checks if check.name == "tokens")
    assert "tokenized differently by llama_cpp itself" in tokens.note and "</s>" in tokens.note
    model.close()


TASK = parity_task(32)
DRIFT = 1.7


class Drifted:
    """A file whose predictions inside prompts, which nobody reads, are others' than its reference's."""

    def __init__(self, model: Runtime) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(self, ids: Sequence[int]) -> Any:
        values = self._model.logits(ids)
        turn = self._model.tokenize("<|im_start|>assistant\n")[1:]
        at = [i for i in range(len(ids)) if list(ids[i : i + len(turn)]) == turn]
        values[: at[-1] + len(turn) - 1] *= DRIFT
        return values


def judged(reference: Runtime, artifact: Any, type: str) -> Verdict:
    prompts, limits = task_prompts(reference, TASK), thresholds_for(type)
    return verify(reference, artifact, prompts, limits, task=TASK, answer_tokens=6)


def test_drift_inside_prompts_rejects_no_quantized_file_whose_answers_are_the_references(
    reference: Runtime, tiny: Tiny, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(accuracy, "_servers", lambda *_: [])
    with closing(open_model(tiny.gguf, threads=1)) as model:
        verdict, exact = (judged(reference, Drifted(model), type) for type in ("Q4_K_M", "F16"))
    assert verdict.passed, verdict.reason
    found = verdict.fidelity
    assert found is not None and found.answers is not None and found.answers.n_prompts == 32
    assert 0.3 > found.kl_mean > 0.2 > 1e-3 > found.answers.kl_mean
    metrics = verdict.as_dict()["fidelity"]
    assert FidelityMetrics(**metrics).answers == FidelityMetrics(**metrics["answers"])
    assert {"kl mean", "kl p99"} <= failed(exact), "in 16 bits every token counts"


@pytest.mark.parametrize("fault", ["swapped", "scaled", "missing"])
def test_one_wrong_tensor_of_a_quantized_file_shows_in_its_answers(
    reference: Runtime, tiny: Tiny, tmp_path: Path, monkeypatch: Patch, fault: str
) -> None:
    import gguf

    monkeypatch.setattr(accuracy, "_servers", lambda *_: [])
    other = next(t for t in gguf.GGUFReader(tiny.gguf).tensors if t.name == "blk.0.attn_v.weight")
    changes: dict[str, Any] = {
        "swapped": lambda rows: np.array(other.data),
        "scaled": lambda rows: 3 * rows,
        "missing": lambda rows: 0 * rows,
    }
    path = with_tensor(tiny.gguf, tmp_path / "wrong.gguf", "blk.1.attn_v.weight", changes[fault])
    with closing(open_model(path, threads=1)) as model:
        verdict = judged(reference, model, "Q4_K_M")
    assert failed(verdict) & {"kl mean, answers", "top-1 agreement, answers"}, verdict.as_dict()["fidelity"]
    assert "a tensor is damaged" in verdict.reason or "weights are damaged" in verdict.reason

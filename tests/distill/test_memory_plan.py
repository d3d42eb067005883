from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import Patch

from arte_edge.device.model_size import ModelSize
from arte_edge.distill import memory_plan as plans
from arte_edge.distill.config import RunConfig
from arte_edge.distill.memory_plan import Models, Tokens, memory_plan, refuse_too_large, training_bytes
from arte_edge.errors import InputError

GB = 10**9
SHAPE: dict[str, Any] = {
    "format": "gguf",
    "architecture": "qwen2",
    "quantization": "Q4_K_M",
    "weight_bytes": 1_111_370_240,
    "token_bytes": 980_098_400,
    "n_params": 1_777_088_000,
    "n_layer": 28,
    "n_kv_head": 2,
    "head_dim": 128,
    "n_embd": 1536,
    "n_ff": 8960,
    "n_vocab": 151_936,
    "n_ctx_train": 32_768,
    "kv_values": 14_336,
    "token_bytes_by_type": {"Q6_K": 354_009_600, "Q4_K": 625_509_216},
}
TEACHER = ModelSize(name="teacher.gguf", **SHAPE)
STUDENT = ModelSize(
    name="student.gguf",
    **SHAPE
    | {"n_params": 134_515_008, "n_layer": 30, "n_embd": 576, "n_ff": 1536, "n_vocab": 49_152}
    | {"weight_bytes": 98_000_000, "kv_values": 11_520, "token_bytes_by_type": {"Q4_1": 98_000_000}},
)
MODELS = Models(TEACHER, STUDENT)
TOKENS = Tokens(teacher=600, draft=600, student=200, pair=650, instruction=120, row=60)


def test_the_stages_follow_what_the_run_does() -> None:
    def stages(config: RunConfig, models: Models = MODELS) -> list[str]:
        return [need.stage for need in memory_plan(config, TOKENS, models, 64 * GB).needs]

    aligned = ["align", "the checks of align"]
    converted = [f"the conversion of {name}.gguf" for name in ("teacher", "student")]
    assert stages(RunConfig()) == [*converted, "drafts and scores", *aligned, "tune"]
    unaligned = RunConfig(data="original-teacher")
    assert stages(unaligned) == [converted[1], "drafts and scores", "tune"]
    made = Models(None, STUDENT, converted=frozenset({"student.gguf"}))
    assert stages(unaligned, made) == ["drafts and scores", "tune"]


def test_all_weights_need_sixteen_bytes_each_and_frozen_ones_two() -> None:
    full = training_bytes(STUDENT, at_once=100, labelled=10, lora=None)
    assert 16 * STUDENT.n_params < full["weights and optimizer"] < 17 * STUDENT.n_params
    frozen, roomy = (training_bytes(TEACHER, at_once=100, labelled=10, lora=(8, ()), room=n * GB) for n in (16, 64))
    assert 2 * TEACHER.n_params < frozen["weights"] < 2.2 * TEACHER.n_params
    assert roomy["weights"] == frozen["weights"] + 2 * TEACHER.n_params  # float32 is faster
    able = training_bytes(TEACHER, at_once=100, labelled=10, lora=(8, ()), bfloat16=True, room=64 * GB)
    assert able["weights"] == frozen["weights"]
    assert frozen["adapter"] < 0.1 * frozen["weights"]
    four_bits = training_bytes(TEACHER, at_once=100, labelled=10, lora=(8, ()), four_bits=True, room=16 * GB)
    assert four_bits["weights"] < 0.6 * frozen["weights"]


def test_a_small_machine_keeps_fewer_activations() -> None:
    needs = [
        training_bytes(TEACHER, at_once=600, labelled=50, lora=(8, ()), room=n * GB)["activations"] for n in (64, 8)
    ]
    assert needs[1] < 0.1 * needs[0]


def test_a_run_that_cannot_fit_names_the_stage_and_what_would_fit(monkeypatch: Patch) -> None:
    monkeypatch.setattr(plans, "total_bytes", lambda: int(4 * GB))
    with pytest.raises(InputError, match=r"align needs [\d.]+ GB of memory, there are 4.00 GB .*weights") as caught:
        refuse_too_large(RunConfig(), TOKENS, Models(TEACHER, STUDENT, converted=frozenset({"teacher.gguf"})))
    hint = caught.value.hint
    assert 'data = "original-teacher"' in hint and "B parameters" in hint
    assert "tune.method" not in hint  # the student's training is not what needs most
    # Longer texts may need more than there is, and then may not.
    monkeypatch.setattr(plans, "total_bytes", lambda: int(4.8 * GB))
    assert not refuse_too_large(RunConfig(), TOKENS, MODELS).fits
    assert plans.would_fit(RunConfig(), TOKENS, MODELS)
    monkeypatch.setattr(plans, "total_bytes", lambda: GB // 10)
    with pytest.raises(InputError) as caught:
        refuse_too_large(RunConfig(), TOKENS, MODELS)
    assert "would fit" not in caught.value.hint


def test_longer_texts_and_more_sequences_need_more() -> None:
    def total(config: RunConfig, tokens: Tokens) -> int:
        return sum(need.total for need in memory_plan(config, tokens, MODELS, 64 * GB).needs)

    least = total(RunConfig(), TOKENS)
    for longer in ({"teacher": 1200}, {"student": 400}, {"pair": 900}, {"row": 120}):
        assert total(RunConfig(), replace(TOKENS, **longer)) > least
    few = RunConfig.model_validate({"teacher": {"model": "m", "parallel": 4}})
    assert total(few, TOKENS) < least


def test_an_8_bit_teacher_keeps_what_its_prompts_share_once() -> None:
    def cache(**tokens: int) -> int:
        models = replace(MODELS, kind="int8")
        plan = memory_plan(RunConfig(data="original-teacher"), replace(TOKENS, **tokens), models, 64 * GB)
        (need,) = (need for need in plan.needs if need.stage == "drafts and scores")
        return need.parts["teacher's cache"]

    one = 2 * TEACHER.kv_bytes(1)
    assert cache(teacher=9000, draft=9000) == one * 37 * 9000
    rounding = 3 * TEACHER.n_vocab * TEACHER.n_embd  # of the output matrix, before there is a cache
    assert cache(teacher=9000, draft=1000) == max(one * (32 * 1000 + 5 * 9000), rounding)
    assert cache(teacher=10, draft=10) == rounding


def test_examples_count_with_their_own_lengths() -> None:
    task = SimpleNamespace(
        seed=[SimpleNamespace(input="x" * 34, target="y")] * 39 + [SimpleNamespace(input="x" * 699, target="y")],
        validation=[],
        description="",
        answer=SimpleNamespace(closed=True),
    )
    config = RunConfig.model_validate({"elicit": {"opinion_shots": 39, "shown": 1}})
    assert Tokens.most(config, task).teacher == (700 + 39 * 35) / 3.5

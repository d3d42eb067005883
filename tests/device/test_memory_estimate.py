"""Will it fit: against what was measured, and what is said when it does not."""

from dataclasses import replace
from typing import Any

import pytest
from tiny import model_shape

from arte_edge.device.memory_estimate import does_not_fit, fit, fit_profile, repacked_types
from arte_edge.device.model_size import ModelSize
from arte_edge.device.profiles import find_device

SMOLLM2 = model_shape()
SMOLLM2_Q4_0 = model_shape(weight_bytes=89_941_248, token_bytes_by_type={"Q8_0": 30_081_024, "Q4_0": 59_719_680})
BY_TYPE = {"Q8_0": 146_105_344, "Q5_0": 173_150_824, "Q6_K": 42_900_480, "Q4_K": 29_417_472}
SIZES = {"kv_values": 6144, "n_embd": 896, "n_ff": 4864, "n_vocab": 151936}
QWEN = model_shape(weight_bytes=485_452_288, token_bytes_by_type=BY_TYPE, **SIZES)
F16 = model_shape(weight_bytes=269_100_288, token_bytes_by_type={"F16": 269_100_288})
ONNX = model_shape(format="onnx-genai", weight_bytes=86_287_616, kv_value_bytes=4)


# Peak resident bytes after a full context was read and 16 tokens written, llama-cpp-python 0.3.36 and
# onnxruntime-genai 0.18.0 with nothing else in the process, x86-64 with AVX2 (2026-11-24).
@pytest.mark.parametrize(
    ("model", "context", "peak_bytes"),
    [
        (SMOLLM2, 512, 234_110_976),
        (SMOLLM2, 2048, 271_962_112),
        (SMOLLM2_Q4_0, 512, 240_476_160),
        (SMOLLM2_Q4_0, 2048, 277_917_696),
        (F16, 512, 360_976_384),
        (F16, 2048, 398_680_064),
        (QWEN, 512, 655_060_992),
        (QWEN, 2048, 676_708_352),
        (ONNX, 512, 338_939_904),
        (ONNX, 2048, 781_295_616),
    ],
)
def test_predictions_are_measured_peaks_or_a_little_more(model: Any, context: int, peak_bytes: int) -> None:
    assert 0.98 <= fit(model, 1 << 40, context).peak_bytes / peak_bytes <= 1.15


@pytest.mark.parametrize("model", [SMOLLM2, QWEN, ONNX])
@pytest.mark.parametrize("memory_bytes", [300_000_000, 500_000_000, 900_000_000])
def test_the_largest_context_fits_and_the_next_step_does_not(model: ModelSize, memory_bytes: int) -> None:
    largest = fit(model, memory_bytes, 512).largest_context_tokens
    if largest:
        assert fit(model, memory_bytes, largest).verdict != "no"
    if largest < model.n_ctx_train:
        assert fit(model, memory_bytes, largest + 512).verdict == "no"


def test_verdicts_and_the_sentence_hold_the_numbers() -> None:
    needed = fit(SMOLLM2, 1 << 40, 512).needed_bytes
    assert fit(SMOLLM2, needed, 512).verdict == "tight"
    assert fit(SMOLLM2, 2 * needed, 512).verdict == "fits"
    no = fit(SMOLLM2, needed - 1, 512)
    assert no.verdict == "no" and no.largest_context_tokens < 512
    assert "does not fit: 248.0 MB of 248.0 MB" in no.summary() and "512 tokens" in no.summary()


def test_a_refusal_says_what_would_fit() -> None:
    long = fit(SMOLLM2, 300_000_000, 8192)
    assert does_not_fit(SMOLLM2, long, "a Zero").hint == f"A context of {long.largest_context_tokens} tokens fits."
    big = replace(QWEN, weight_bytes=900_000_000)
    error = does_not_fit(big, fit(big, 400_000_000, 512), "raspberry-pi-zero-2w")
    assert "a.gguf on raspberry-pi-zero-2w does not fit" in error.message
    assert error.hint.startswith("Weights of up to ")
    assert error.exit_code == 2
    assert does_not_fit(big, fit(big, 1000, 512), "x").hint.startswith("No model of this kind")


def test_repacked_weights_count_in_the_peak_and_not_in_the_need() -> None:
    pi5 = fit_profile(SMOLLM2, find_device("raspberry-pi-5"), 512)
    assert pi5.peak_bytes - pi5.needed_bytes == 143_025_408  # Q8_0 is repacked where there are dot products
    pi4 = fit_profile(SMOLLM2, find_device("raspberry-pi-4b"), 512)
    assert pi4.peak_bytes == pi4.needed_bytes
    assert repacked_types("x86_64", ("avx2",)) == ("Q4_0", "Q4_K", "IQ4_NL")


def test_half_a_gigabyte_is_enough_for_the_small_student_only() -> None:
    zero = find_device("raspberry-pi-zero-2w")
    assert fit_profile(SMOLLM2, zero, 512).verdict != "no"
    assert fit_profile(QWEN, zero, 512).verdict == "no"

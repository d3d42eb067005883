import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny import Make, hf_logits, relative_error

from arte_edge.gguf.convert import convert
from arte_edge.gguf.from_base import checkpoint_to_gguf
from arte_edge.gguf.names import families
from arte_edge.gguf.reader import read_model_header

PLAIN = {"rope_theta": 10_000.0}
SHORT = PLAIN | {"original_max_position_embeddings": 32}
LLAMA3_ROPE = SHORT | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = SHORT | {"rope_type": "yarn", "factor": 4.0}
LINEAR = PLAIN | {"rope_type": "linear", "factor": 4.0}
FACTORS = {f"{name}_factor": [1.0 + x * i for i in range(8)] for name, x in (("short", 0.1), ("long", 0.7))}
LONG_ROPE = PLAIN | FACTORS | {"rope_type": "longrope"}
IDS = [1, *(7 * i % 250 + 20 for i in range(39))]  # more than the sliding window of the tiny Gemma

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen2", {"rope_parameters": YARN | {"attention_factor": 0.7}}),
    ("qwen3", {}),
    ("gemma3", {}),
    ("gemma3", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}}),
    ("smollm3", {}),
    ("smollm3", {"rope_parameters": YARN}),
    ("phi3", {}),
    ("phi3", {"rope_parameters": LONG_ROPE | {"original_max_position_embeddings": 128}}),
    ("granite", {}),
    ("granite", {"rope_parameters": LLAMA3_ROPE}),
    ("granite", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("family", "config"), CASES, ids=lambda part: str(part)[:40])
def test_llama_cpp_gives_the_logits_of_the_checkpoint_prefilled_and_step_by_step(
    family: str, config: dict[str, Any], make_checkpoint: Make, llama_logits: Make, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(family, **config)
    out = convert(checkpoint, tmp_path / "student.gguf", "F32")
    expected = hf_logits(checkpoint, IDS)
    assert relative_error(llama_logits(out, IDS, len(IDS)), expected) < 1e-3
    steps = llama_logits(out, IDS, 8)
    assert relative_error(steps, expected) < 1e-3
    assert max(relative_error(row, wanted) for row, wanted in zip(steps, expected, strict=True)) < 1e-3


def test_every_family_has_a_case() -> None:
    assert {family for family, _ in CASES} == set(families())


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        *((family, {}, {}) for family in sorted(families())),
        ("llama", {"rope_parameters": LINEAR}, {"rope_parameters": LLAMA3_ROPE}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}, {"rope_parameters": YARN | {"attention_factor": 1.0}}),
    ],
    ids=lambda part: str(part)[:40],
)
def test_a_base_patched_and_a_conversion_are_equal_with_the_rotary_scaling_of_the_checkpoint(
    family: str, before: dict[str, Any], after: dict[str, Any], make_checkpoint: Make, tmp_path: Path
) -> None:
    base = convert(make_checkpoint(family, **before), tmp_path / "base.gguf")
    trained = make_checkpoint(family, seed=8, **after)
    patched = checkpoint_to_gguf(trained, base, tmp_path / "patched.gguf")
    converted = convert(trained, tmp_path / "converted.gguf")
    one, two = read_model_header(patched), read_model_header(converted)
    assert (one.fields, one.shapes) == (two.fields, two.shapes)
    assert list(one.tensors) == list(two.tensors)  # so that the tensor hash is the same
    values = [
        {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
        for path in (patched, converted, base)
    ]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("family", sorted(families()))
def test_rounding_is_that_of_ggml(family: str, dtype: str, make_checkpoint: Make, tmp_path: Path) -> None:
    wide = convert(make_checkpoint(family), tmp_path / "wide.gguf", "F32")
    narrow = convert(make_checkpoint(family), tmp_path / "narrow.gguf", dtype)  # type: ignore[arg-type]
    for before, after in zip(gguf.GGUFReader(wide).tensors, gguf.GGUFReader(narrow).tensors, strict=True):
        assert before.name == after.name
        expected = gguf.quantize(np.array(before.data), after.tensor_type)
        assert np.array_equal(expected.view(np.uint8), after.data.view(np.uint8)), before.name
        assert after.tensor_type.name == (dtype if before.data.ndim == 2 else "F32")


def test_the_name_of_the_folder_does_not_change_the_file(make_checkpoint: Make, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama")
    other = tmp_path / "my-secret-project-7B"
    shutil.copytree(checkpoint, other)
    one, two = convert(checkpoint, tmp_path / "one.gguf"), convert(other, tmp_path / "two.gguf")
    assert one.read_bytes() == two.read_bytes()
    assert b"secret" not in two.read_bytes()
    name = read_model_header(one).fields["general.name"].value
    assert name.startswith(b"Llama ")


def test_longrope_takes_its_long_factors(make_checkpoint: Make, llama_logits: Make, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("phi3", rope_parameters=LONG_ROPE | {"original_max_position_embeddings": 32})
    out = convert(checkpoint, tmp_path / "student.gguf", "F32")
    assert len(IDS) > 32  # transformers chooses by the text's length, llama.cpp by the context's
    assert relative_error(llama_logits(out, IDS, len(IDS)), hf_logits(checkpoint, IDS)) < 1e-3

import pytest

from arte_edge.export.outcome import estimate
from arte_edge.export.recipe import Recipe, build
from arte_edge.models.artifact import format_of, predicted_bytes


def shapes(hidden: int, ffn: int, n_layer: int, kv: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama with a tied output matrix."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(n_layer):
        layer = f"model.layers.{i}."
        found |= {
            f"{layer}self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}self_attn.k_proj.weight": (kv, hidden),
            f"{layer}self_attn.v_proj.weight": (kv, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}mlp.gate_proj.weight": (ffn, hidden),
            f"{layer}mlp.up_proj.weight": (ffn, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, ffn),
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
        }
    return found


SMOLLM2 = shapes(576, 1536, 30, 192, 49152)


# Measured with SmolLM2-135M-Instruct: llama-cpp-python 0.3.36, onnxruntime-genai 0.18, optimum-onnx 0.1.
@pytest.mark.parametrize(
    ("label", "size_bytes"),
    [
        ("F16", 270_886_432),
        ("Q8_0", 144_811_552),
        ("Q6_K", 138_383_776),
        ("Q4_K_M", 105_454_624),
        ("Q4_0", 91_893_664),
        ("int4", 117_156_833),
        ("int8", 270_528_662),
        ("fp32", 543_857_348),
        ("optimum-int8-avx512", 247_926_534),
        ("optimum-fp32", 656_064_862),
    ],
)
def test_sizes_are_within_three_percent_of_real_files(label: str, size_bytes: int) -> None:
    assert predicted_bytes(format_of(label), SMOLLM2) == pytest.approx(size_bytes, rel=0.03)


def test_rows_that_256_divides_take_fewer_bits() -> None:
    fits, falls_back = shapes(2048, 8192, 4, 512, 32000), shapes(2048 + 64, 8192 + 64, 4, 512, 32000)
    per_weight = [
        predicted_bytes(format_of("Q4_K_M"), s) / predicted_bytes(format_of("F16"), s) for s in (fits, falls_back)
    ]
    assert per_weight[0] < 0.9 * per_weight[1]


def test_the_16_bit_base_counts_unless_it_is_exported_itself() -> None:
    def of(*labels: str) -> int:
        formats = [format_of(label) for label in labels]
        return estimate(SMOLLM2, formats, Recipe(), n_training=0).base_bytes

    assert of("Q8_0") > 0 and of("Q8_0", "F16") == of("int4") == of("BF16") == 0


def test_an_importance_matrix_is_expected_only_where_it_matters() -> None:
    def planned(label: str, n_training: int, recipe: Recipe) -> bool:
        return estimate(SMOLLM2, [format_of(label)], recipe, n_training=n_training).imatrix

    without = build("r", {"gguf": {"imatrix": False}})
    assert planned("Q4_K_M", 9, Recipe())
    assert not planned("Q8_0", 9, Recipe())
    assert not planned("int4", 9, Recipe())
    assert not planned("Q4_K_M", 0, Recipe())
    assert not planned("Q4_K_M", 9, without)


def test_memory_names_the_step_that_needs_most() -> None:
    gguf = estimate(SMOLLM2, [format_of("Q4_K_M")], Recipe(), n_training=0)
    onnx = estimate(SMOLLM2, [format_of("optimum-fp32")], Recipe(), n_training=0)
    assert gguf.memory_step == "verifying" and onnx.memory_step == "building ONNX"
    assert onnx.memory_bytes > gguf.memory_bytes

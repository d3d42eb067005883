from __future__ import annotations

import pytest

from arte_edge.errors import InputError
from arte_edge.gguf.reader import QUANT_TYPES
from arte_edge.models.artifact import Format, format_of, gguf_format, onnx_format, parse_list


@pytest.mark.parametrize(("text", "type"), [("q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), (" f16 ", "F16")])
def test_gguf_types_in_any_case_and_short_names(text: str, type: str) -> None:
    assert gguf_format(text) == Format("gguf", type)


def test_an_unknown_type_names_the_nearest_one() -> None:
    with pytest.raises(InputError, match="Q4_KM") as error:
        gguf_format("Q4_KM")
    assert "Q4_K_M" in error.value.hint


def test_a_removed_type_names_its_replacement() -> None:
    with pytest.raises(InputError) as error:
        gguf_format("Q4_0_4_4")
    assert "Q4_0" in error.value.hint


@pytest.mark.parametrize(
    ("text", "format"),
    [
        ("int4", Format("onnx-genai", "int4")),
        ("FP32", Format("onnx-genai", "fp32")),
        ("optimum-fp32", Format("onnx-optimum", "fp32")),
        ("optimum-int8", Format("onnx-optimum", "int8", "avx512")),
        ("optimum-int8-arm64", Format("onnx-optimum", "int8", "arm64")),
    ],
)
def test_onnx_formats(text: str, format: Format) -> None:
    assert onnx_format(text, "avx512") == format


@pytest.mark.parametrize(
    "text", ["int3", "optimum", "optimum-int4", "optimum-int8-sparc", "optimum-fp32-avx2"]
)
def test_an_unknown_onnx_format_is_rejected(text: str) -> None:
    with pytest.raises(InputError):
        onnx_format(text)


def test_lists_are_in_order_without_repetitions() -> None:
    labels = [format.label for format in parse_list("Q8_0,q4_k_m,Q4_K", "int4")]
    assert labels == ["Q8_0", "Q4_K_M", "int4"]


def test_an_empty_list_is_an_error() -> None:
    with pytest.raises(InputError, match="--gguf"):
        parse_list(" , ", None)


def test_every_label_leads_back_to_its_format() -> None:
    formats = [Format("gguf", name) for name in QUANT_TYPES]
    formats += [onnx_format(name) for name in ("int4", "int8", "fp32", "optimum-fp32", "optimum-int8-arm64")]
    assert [format_of(format.label) for format in formats] == formats


def test_no_two_formats_share_a_file() -> None:
    formats = [Format("gguf", name) for name in QUANT_TYPES]
    formats += [onnx_format(name) for name in ("int4", "int8", "fp32", "optimum-fp32")]
    formats += [onnx_format(f"optimum-int8-{arch}") for arch in ("arm64", "avx2", "avx512")]
    assert len({format.file_name("m") for format in formats}) == len(formats)

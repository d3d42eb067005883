"""The head of a GGUF: what is read agrees with GGML, and nothing damaged gets through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arte_edge.errors import InputError
from arte_edge.models.gguf_header import read_header
from arte_edge.models.gguf_types import FILE_TYPES, TENSOR_TYPES

Make = Callable[..., Path]
# The fixture's path does not change between examples; the files written from it do.
_examples = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_type_tables_are_those_of_ggml() -> None:
    gguf = pytest.importorskip("gguf")
    sizes = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {number: sizes[number] for number in TENSOR_TYPES if number in sizes} == {
        number: row for number, row in TENSOR_TYPES.items() if number in sizes
    }
    assert len(set(sizes) & set(TENSOR_TYPES)) > 25
    names = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType}
    assert {n: names[n] for n in FILE_TYPES if n in names} == {
        n: FILE_TYPES[n] for n in FILE_TYPES if n in names
    }


def test_header_says_what_was_written(make_gguf: Make) -> None:
    gguf = pytest.importorskip("gguf")
    path = make_gguf()
    header = read_header(path)
    assert (header.architecture, header.quantization, header.context_tokens) == ("llama", "Q8_0", 128)
    assert header.chat_template == "{{ messages }}"
    assert (header.tensor_count, header.parameter_count) == (2, 8 * 32 + 32)
    assert header.metadata["tokenizer.ggml.tokens"] == 3
    assert header.data_offset_bytes == gguf.GGUFReader(path).data_offset


def test_the_tensors_name_the_quantization_when_the_file_type_does_not(make_gguf: Make) -> None:
    path = make_gguf()
    content = path.read_bytes().replace(b"general.file_type", b"general.file_typo")
    path.write_bytes(content)
    assert read_header(path).quantization == "Q8_0"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty file"),
        (b"PK\x03\x04 a zip file", "begins with b'PK"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), "version 1"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "big-endian"),
        (b"GGUF", "cut short"),
    ],
)
def test_what_is_no_gguf_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_header(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ({"general__type": "adapter"}, "LoRA adapter"),
        ({"general__type": "mmproj"}, "image part"),
        ({"rows": 0}, "no tensors"),
        ({"split__count": 3}, "one of 3 pieces"),
        ({"arch": ""}, "architecture"),
        ({"general__alignment": 0}, "alignment"),
    ],
)
def test_a_gguf_that_is_no_model_is_refused(make_gguf: Make, pairs: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_header(make_gguf(**pairs))


def test_a_type_from_the_future_is_named(make_gguf: Make) -> None:
    path = make_gguf()
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    content[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"attn_q\.weight has the unknown type 99"):
        read_header(path)


@_examples
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(make_gguf: Make, share: float) -> None:
    path = make_gguf()
    content = path.read_bytes()
    header = read_header(path)
    last_byte = header.data_offset_bytes + 8 * 34 + (-8 * 34) % 32 + 32 * 4
    path.write_bytes(content[: int(share * last_byte)])
    with pytest.raises(InputError):
        read_header(path)


@_examples
@given(
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_no_damage_ends_in_anything_but_an_input_error(
    make_gguf: Make, places: list[tuple[float, int]]
) -> None:
    path = make_gguf()
    content = bytearray(path.read_bytes())
    for share, value in places:
        content[int(share * len(content))] = value
    path.write_bytes(content)
    try:
        read_header(path)
    except InputError as error:
        assert str(path) in error.message

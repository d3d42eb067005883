"""The GGUF reader: agrees with GGML's own package, rejects damaged files, parses each file once."""

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import Make, Patch

from arte_edge.device.model_size import ModelSize
from arte_edge.errors import InputError
from arte_edge.gguf import reader, rope
from arte_edge.gguf.names import layout_of
from arte_edge.gguf.reader import (
    ARRAY,
    BOOL,
    FILE_TYPES,
    FLOAT32,
    STRING,
    TENSOR_TYPES,
    UINT32,
    UINT64,
    Field,
    read_header,
    read_model_header,
)
from arte_edge.gguf.writer import rewrite

# The fixture's path does not change between examples; the files written from it do.
_examples = settings(max_examples=80, suppress_health_check=list(HealthCheck))


def test_type_tables_are_those_of_ggml() -> None:
    gguf = pytest.importorskip("gguf")
    sizes = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert len(sizes.keys() & TENSOR_TYPES.keys()) > 25
    names = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType}
    for theirs, ours in ((sizes, TENSOR_TYPES), (names, FILE_TYPES)):
        assert [n for n in theirs.keys() & ours.keys() if theirs[n] != ours[n]] == []


def test_header_says_what_was_written(make_gguf: Make) -> None:
    gguf = pytest.importorskip("gguf")
    path = make_gguf()
    header = read_model_header(path)
    assert (header.architecture, header.quantization, header.context_tokens) == ("llama", "Q8_0", 128)
    assert header.chat_template == "{{ messages }}"
    assert (len(header.tensors), header.parameter_count) == (2, 8 * 32 + 32)
    assert header.metadata["tokenizer.ggml.tokens"] == ["a", "bc", "def"]
    assert header.data_offset_bytes == gguf.GGUFReader(path).data_offset


def test_the_tensors_name_the_quantization_when_the_file_type_does_not(make_gguf: Make) -> None:
    path = make_gguf()
    path.write_bytes(path.read_bytes().replace(b"general.file_type", b"general.file_typo"))
    assert read_model_header(path).quantization == "Q8_0"


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
        read_model_header(path)
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
def test_a_gguf_that_is_no_model_is_rejected(make_gguf: Make, pairs: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_model_header(make_gguf(**pairs))


def overwrite(path: Path, after: bytes, skip: int, value: bytes) -> None:
    """Put `value` where `skip` bytes have passed since the first `after`."""
    content = bytearray(path.read_bytes())
    at = content.index(after) + len(after) + skip
    content[at : at + len(value)] = value
    path.write_bytes(content)


@_examples
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_rejected(make_gguf: Make, share: float) -> None:
    path = make_gguf()
    content = path.read_bytes()
    header = read_model_header(path)
    last_byte = header.data_offset_bytes + 8 * 34 + (-8 * 34) % 32 + 32 * 4
    path.write_bytes(content[: int(share * last_byte)])
    with pytest.raises(InputError):
        read_model_header(path)


WRONG = [
    Field(STRING, b"\xff\xfe"),
    Field(FLOAT32, math.nan),
    Field(FLOAT32, -math.inf),
    Field(BOOL, True),
    Field(UINT64, (1 << 64) - 1),
    Field(UINT32, 0),
    Field(ARRAY, [1, 2], UINT32),
    Field(ARRAY, [math.nan], FLOAT32),
    Field(ARRAY, [], STRING),
]


@pytest.mark.parametrize("value", WRONG, ids=str)
def test_a_value_of_another_kind_is_no_crash_for_anyone_who_uses_it(
    value: Field, tiny_model: Any, tmp_path: Path
) -> None:
    whole = read_model_header(tiny_model("llama").base_gguf)
    keys = [key for key in whole.fields if not key.startswith(("general.arch", "general.align"))]
    for key in (*keys, "llama.rope.scaling.factor", "llama.rope.scaling.type", "llama.rope.scaling.attn_factor"):
        out = tmp_path / "wrong.gguf"
        rewrite(whole.path, {key: value}, out=out)
        uses = (rope.restored, lambda h: layout_of(h).gguf_name("lm_head.weight"), lambda h: ModelSize.of(h.path))
        for use in (*uses, lambda h: (h.quantization, h.context_tokens, h.chat_template, h.parameter_count)):
            with contextlib.suppress(InputError):
                use(read_model_header(out))


def test_reading_agrees_with_the_library_of_the_format(tiny_model: Any) -> None:
    from gguf import GGUFReader

    path = tiny_model("gemma3").base_gguf
    ours, theirs = read_model_header(path), GGUFReader(path)
    for key, field in ours.fields.items():
        wanted = theirs.get_field(key).contents()
        value = [getattr(v, "decode", lambda v=v: v)() for v in np.atleast_1d(np.array(field.value, dtype=object))]
        assert value == (wanted if isinstance(wanted, list) else [wanted])
    assert [(t.name, t.shape, t.type, t.offset_bytes, t.size_bytes) for t in ours.tensors.values()] == [
        (t.name, tuple(reversed(t.shape.tolist())), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in theirs.tensors
    ]


def test_a_number_that_is_missing_is_an_input_error(tiny_model: Any) -> None:
    head = read_model_header(tiny_model("llama").base_gguf)
    assert head.number("block_count") == 2
    with pytest.raises(InputError, match=r"llama\.expert_count"):
        head.number("expert_count")


def test_only_f32_is_read_as_floats(make_gguf: Make) -> None:
    header = read_header(make_gguf())
    assert header.floats("output_norm.weight").tolist() == list(range(32))
    with pytest.raises(InputError, match="Q8_0, expected F32"):
        header.floats("blk.0.attn_q.weight")
    with pytest.raises(InputError, match="missing"):
        header.floats("nothing")
    with pytest.raises(InputError, match="No such file"):
        read_header(header.path.with_name("none.gguf"))


def test_a_huge_count_costs_no_memory(make_gguf: Make) -> None:
    path = make_gguf()
    overwrite(path, b"tokenizer.ggml.tokens", 8, np.uint64(2**60).tobytes())
    with pytest.raises(InputError, match="cut short"):
        read_header(path)


@pytest.fixture
def parsed(monkeypatch: Patch) -> list[Path]:
    """The files whose header was parsed, in order."""
    found: list[Path] = []
    parse = reader._parsed
    monkeypatch.setattr(reader, "_parsed", lambda path: found.append(path) or parse(path))
    return found


def test_a_file_is_parsed_once_even_if_renamed_or_linked(make_gguf: Make, parsed: list[Path]) -> None:
    path = make_gguf()
    link, renamed = path.with_name("link.gguf"), path.with_name("renamed.gguf")
    assert read_model_header(path).path == path
    os.link(path, link)
    assert read_header(link).path == link
    path.rename(renamed)
    assert read_header(renamed).floats("output_norm.weight").tolist() == list(range(32))
    assert parsed == [path]


def test_a_file_that_changed_is_parsed_again(make_gguf: Make, parsed: list[Path]) -> None:
    path = make_gguf()
    for text in (b"one", b"two"):  # of the same size, and at once
        rewrite(path, {"general.name": Field(STRING, text)})
        assert read_header(path).metadata["general.name"] == text.decode()
        content = path.read_bytes().replace(text, b"new")
        path.write_bytes(content)
        assert read_header(path).metadata["general.name"] == "new"


def test_a_newer_tensor_type_is_named_and_does_not_stop_a_change_of_metadata(make_gguf: Make) -> None:
    path = make_gguf()
    overwrite(path, b"output_norm.weight", 4 + 8, (99).to_bytes(4, "little"))
    assert rewrite(path, {"arte_edge.a": Field(STRING, b"x")}).changed
    for read in (read_header, read_model_header):
        with pytest.raises(InputError, match=r"output_norm\.weight has the unknown type 99"):
            read(path)

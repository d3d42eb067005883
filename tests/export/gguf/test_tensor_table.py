"""The reader of tensor records: right on what GGML's own writer wrote, an error on anything damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arte_edge.errors import InputError
from arte_edge.export.gguf.tensor_table import read_table


def test_tensors_and_metadata_are_those_that_were_written(make_gguf: Callable[..., Path]) -> None:
    import gguf

    path = make_gguf(rows=4)
    table = read_table(path)
    reader = gguf.GGUFReader(path)
    assert {t.name: (t.type, t.offset_bytes, t.size_bytes) for t in table.tensors.values()} == {
        t.name: (t.tensor_type.name, t.data_offset, t.n_bytes) for t in reader.tensors
    }
    assert table.tensors["blk.0.attn_q.weight"].shape == (4, 32)
    assert table.metadata["general.architecture"] == "llama"
    assert table.metadata["tokenizer.ggml.tokens"] == ["a", "bc", "def"]
    assert table.floats("output_norm.weight").tolist() == list(range(32))


def test_only_f32_is_read_as_floats(make_gguf: Callable[..., Path]) -> None:
    table = read_table(make_gguf())
    with pytest.raises(InputError, match="Q8_0, expected F32"):
        table.floats("blk.0.attn_q.weight")
    with pytest.raises(InputError, match="missing"):
        table.floats("nothing")


def test_a_missing_file_is_the_user_s_mistake(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_table(tmp_path / "none.gguf")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_but_never_a_crash(
    make_gguf: Callable[..., Path], data: st.DataObject
) -> None:
    path = make_gguf(rows=2)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.with_name("damaged.gguf").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        table = read_table(path.with_name("damaged.gguf"))
    except InputError:
        return
    assert all(t.offset_bytes + t.size_bytes <= len(content) for t in table.tensors.values())


def test_a_huge_count_costs_no_memory(make_gguf: Callable[..., Path]) -> None:
    path = make_gguf()
    content = bytearray(path.read_bytes())
    at = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    content[at : at + 8] = np.uint64(2**60).tobytes()
    path.write_bytes(content)
    with pytest.raises(InputError, match="cut short"):
        read_table(path)

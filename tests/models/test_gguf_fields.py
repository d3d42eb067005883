from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arte_edge.errors import InputError
from arte_edge.models.gguf_fields import Field, read_fields
from arte_edge.models.gguf_write import Tensor, write_gguf

SCALARS = {
    0: st.integers(0, 2**8 - 1),
    1: st.integers(-(2**7), 2**7 - 1),
    4: st.integers(0, 2**32 - 1),
    5: st.integers(-(2**31), 2**31 - 1),
    6: st.floats(width=32, allow_nan=False),
    7: st.booleans(),
    8: st.binary(max_size=12),  # a token need not be UTF-8
    10: st.integers(0, 2**64 - 1),
}


def fields() -> st.SearchStrategy[dict[str, Field]]:
    scalar = [st.builds(Field, st.just(kind), values) for kind, values in SCALARS.items()]
    array = [
        st.builds(Field, st.just(9), st.lists(values, min_size=1, max_size=5), st.just(kind))
        for kind, values in SCALARS.items()
    ]
    keys = st.text("abcxyz._é", min_size=1, max_size=10).map(lambda key: f"x.{key}")
    return st.dictionaries(keys, st.one_of(*scalar, *array), max_size=6)


@settings(max_examples=60, deadline=None)
@given(fields(), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_what_is_written_is_read(written: dict[str, Field], shape: list[int]) -> None:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        write_gguf(path, "llama", written, [Tensor("weight", tuple(shape), "F32", lambda: values)])
        read = read_fields(path)
    assert read.architecture == "llama"
    assert {key: field for key, field in read.fields.items() if key != "general.architecture"} == written
    assert read.shapes == {"weight": tuple(shape)}


def test_reading_agrees_with_the_library_of_the_format(tiny_model: Any) -> None:
    from gguf import GGUFReader

    path = tiny_model("gemma3").base_gguf
    ours, theirs = read_fields(path), GGUFReader(path)
    for key, field in ours.fields.items():
        wanted = theirs.get_field(key).contents()
        assert (field.value.decode() if isinstance(field.value, bytes) else field.value) == wanted
    assert ours.shapes == {t.name: tuple(reversed(t.shape.tolist())) for t in theirs.tensors}


def test_a_number_that_is_missing_is_an_input_error(tiny_model: Any) -> None:
    head = read_fields(tiny_model("llama").base_gguf)
    assert head.number("block_count") == 2
    with pytest.raises(InputError, match=r"llama\.expert_count"):
        head.number("expert_count")

"""Importance matrices as files: what is written is what llama.cpp's loader reads, and what it divides."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arte_edge.errors import InputError
from arte_edge.gguf.imatrix import Imatrix, base_name, read_imatrix, write_imatrix


def example() -> Imatrix:
    sums = {
        "blk.0.ffn_up.weight": np.array([[1.0, 4.0, 9.0]], np.float32),
        "blk.0.ffn_down_exps.weight": np.array([[2.0, 4.0], [5.0, 5.0]], np.float32),  # two experts
    }
    counts = {
        "blk.0.ffn_up.weight": np.array([2.0], np.float32),
        "blk.0.ffn_down_exps.weight": np.array([4.0, 0.0], np.float32),
    }
    return Imatrix(sums, counts, ("/home/somebody/prompts.txt",), 3, "key")


def test_a_matrix_comes_back_as_it_was_written(tmp_path: Path) -> None:
    found = read_imatrix(write_imatrix(example(), tmp_path / "m.gguf"))
    assert (found.datasets, found.chunk_count, found.key, found.n_token) == (("prompts.txt",), 3, "key", 4)
    for name, sums in example().sums.items():
        assert found.sums[name].tolist() == sums.tolist()
        assert found.counts[name].tolist() == example().counts[name].tolist()


def test_weights_are_means_and_ones_where_no_token_came() -> None:
    weights = example().weights()
    assert weights["blk.0.ffn_up.weight"].tolist() == [0.5, 2.0, 4.5]
    assert weights["blk.0.ffn_down_exps.weight"].tolist() == [0.5, 1.0, 1.0, 1.0]
    assert all(values.dtype == np.float32 and values.flags.c_contiguous for values in weights.values())


def test_the_layout_is_the_one_of_llama_imatrix(tmp_path: Path) -> None:
    # tools/imatrix/imatrix.cpp: general.type first, then these keys; sums and counts in pairs, by name.
    import gguf

    reader = gguf.GGUFReader(write_imatrix(example(), tmp_path / "m.gguf"))
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert keys[:4] == ["general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"]
    assert "general.architecture" not in keys
    for key in ("imatrix.chunk_count", "imatrix.chunk_size"):
        assert reader.fields[key].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["imatrix.datasets"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
    assert [(t.name, t.shape.tolist(), t.tensor_type.name) for t in reader.tensors] == [
        ("blk.0.ffn_down_exps.weight.in_sum2", [2, 2], "F32"),
        ("blk.0.ffn_down_exps.weight.counts", [1, 2], "F32"),
        ("blk.0.ffn_up.weight.in_sum2", [3, 1], "F32"),
        ("blk.0.ffn_up.weight.counts", [1, 1], "F32"),
    ]


def test_the_same_matrix_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_imatrix(example(), tmp_path / name).read_bytes() for name in ("a.gguf", "b.gguf"))
    assert first == second
    assert b"somebody" not in first


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("/home/me/a.txt", "a.txt"),
        ("C:\\Users\\me\\a.txt", "a.txt"),
        ("training prompts", "training prompts"),
        ("/", "prompts"),
    ],
)
def test_only_the_last_part_of_a_name_is_kept(name: str, base: str) -> None:
    assert base_name(name) == base


def test_what_is_no_matrix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.dat").write_bytes(b"\x02\x00\x00\x00\x0a\x00\x00\x00blk.0.ffn_")
    with pytest.raises(InputError, match="not a usable GGUF"):
        read_imatrix(tmp_path / "old.dat")


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    broken = example()
    broken.sums["blk.0.ffn_up.weight"][0, 1] = 12345.5
    path = write_imatrix(broken, tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(np.float32(12345.5).tobytes(), np.float32(np.inf).tobytes()))
    with pytest.raises(InputError, match="not finite"):
        read_imatrix(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_but_never_a_crash(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(write_imatrix(example(), tmp_path / "m.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged.gguf").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = read_imatrix(tmp_path / "damaged.gguf")
    except InputError:
        return
    assert all(np.isfinite(values).all() for values in found.weights().values())

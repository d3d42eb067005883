"""Metadata is set, replaced and deleted; everything else of the file stays, in any circumstances."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import Make, Patch

from arte_edge.errors import ArteError, InputError
from arte_edge.gguf.reader import ARRAY, BOOL, FLOAT32, STRING, UINT32, UINT64, Field, read_header
from arte_edge.gguf.writer import rewrite
from arte_edge.models.artifact import checksums_of

gguf = pytest.importorskip("gguf")


def values(path: Path) -> dict[str, Any]:
    """Return the metadata as GGML's own reader sees it."""
    reader = gguf.GGUFReader(path)
    return {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, tuple[Any, bytes]]:
    return {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def test_keys_are_set_replaced_and_deleted_and_nothing_else_changes(make_gguf: Make) -> None:
    path = make_gguf(general__name="old", arte_edge__bench__0__device="pi4", arte_edge__bench__count=1)
    before, weights = values(path), tensors(path)
    fields = {"general.name": Field(STRING, b"new"), "arte_edge.x": Field(UINT64, 1 << 40)}
    rewrite(path, fields, drop=("arte_edge.bench.",))
    gone = {"arte_edge.bench.0.device", "arte_edge.bench.count"}
    kept = {key: value for key, value in before.items() if key not in gone}
    assert values(path) == kept | {"general.name": "new", "arte_edge.x": 1 << 40}
    assert list(values(path))[: len(kept)] == list(kept)  # in their order
    assert tensors(path) == weights


def test_a_second_run_writes_nothing(make_gguf: Make) -> None:
    path = make_gguf()
    fields = {"arte_edge.a": Field(FLOAT32, 0.1), "arte_edge.b": Field(BOOL, True)}
    assert rewrite(path, fields, drop=("arte_edge.",)).changed
    data, state = path.read_bytes(), path.stat()
    assert not rewrite(path, fields, drop=("arte_edge.",)).changed
    assert path.read_bytes() == data
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (state.st_mtime_ns, state.st_ino)


def test_the_sum_it_returns_is_that_of_the_file(make_gguf: Make) -> None:
    path = make_gguf()
    before = checksums_of(path)
    done = rewrite(path, {"arte_edge.a": Field(STRING, b"x" * 100)})
    after = checksums_of(path)
    assert done.sha256 == after.sha256 != before.sha256
    assert after.tensor_sha256 == before.tensor_sha256


WHOLE = {
    f"{u}int{bits}": (0 if u else -(1 << bits - 1), (1 << bits - (not u)) - 1)
    for u in ("u", "")
    for bits in (8, 16, 32, 64)
}
FLOATS = {width: st.floats(width=width, allow_nan=False) for width in (32, 64)}
ITEMS = (st.text(max_size=5), st.integers(-9, 9), FLOATS[32], st.booleans())
SCALARS = st.one_of(
    *(st.tuples(st.just(f"add_{name}"), st.integers(*ends)) for name, ends in WHOLE.items()),
    *(st.tuples(st.just(f"add_float{width}"), values) for width, values in FLOATS.items()),
    st.tuples(st.just("add_bool"), st.booleans()),
    st.tuples(st.just("add_string"), st.text(max_size=20)),
    *(st.tuples(st.just("add_array"), st.lists(item, min_size=1, max_size=4)) for item in ITEMS),
)
KEYS = st.from_regex(r"[a-z]{1,6}(\.[a-z0-9_]{1,6}){1,2}", fullmatch=True)
BYTES = st.text(max_size=30).map(str.encode)
FIELDS = st.one_of(
    st.builds(Field, st.just(STRING), BYTES),
    st.builds(Field, st.just(UINT32), st.integers(0, (1 << 32) - 1)),
    st.builds(Field, st.just(BOOL), st.booleans()),
    st.builds(Field, st.just(FLOAT32), FLOATS[32]),
    st.builds(Field, st.just(ARRAY), st.lists(BYTES, min_size=1), st.just(STRING)),
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    pairs=st.dictionaries(KEYS, SCALARS, max_size=6),
    fields=st.dictionaries(KEYS, FIELDS, max_size=4),
    alignment=st.sampled_from((None, 16, 64, 256)),
    seed=st.integers(0, 1 << 16),
)
def test_any_metadata_survives_as_ggmls_own_reader_sees_it(
    tmp_path: Path, pairs: dict[str, Any], fields: dict[str, Field], alignment: int | None, seed: int
) -> None:
    path = tmp_path / "any.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (add, value) in pairs.items():
        getattr(writer, add)(key, value)
    random = np.random.default_rng(seed)
    for name in ("a.weight", "b.weight"):
        writer.add_tensor(name, random.standard_normal((3, int(random.integers(1, 40)))).astype(np.float32))
    tiny.finish(writer)
    before, weights = values(path), tensors(path)
    rewrite(path, fields)

    def text(value: Any) -> Any:
        return [v.decode() for v in value] if isinstance(value, list) else getattr(value, "decode", lambda: value)()

    assert values(path) == before | {key: text(field.value) for key, field in fields.items()}
    assert read_header(path).metadata == values(path)
    assert tensors(path) == weights
    assert all(t.data_offset % (alignment or 32) == 0 for t in gguf.GGUFReader(path).tensors)
    data = path.read_bytes()
    rewrite(path, fields)
    assert path.read_bytes() == data
    rewrite(path, {}, drop=tuple(fields))
    left = {key: value for key, value in before.items() if key not in fields}
    assert values(path) == left


@pytest.mark.parametrize("key", ["general.alignment", "general.architecture", "", "a b", "a..b", "ä.b"])
def test_a_key_that_must_not_be_set_is_rejected(make_gguf: Make, key: str) -> None:
    path = make_gguf()
    data = path.read_bytes()
    with pytest.raises(InputError, match="cannot be set"):
        rewrite(path, {key: Field(UINT32, 1)})
    assert path.read_bytes() == data


def test_a_value_that_does_not_fit_is_rejected(make_gguf: Make) -> None:
    with pytest.raises(InputError, match=r"arte_edge\.a: cannot be written"):
        rewrite(make_gguf(), {"arte_edge.a": Field(UINT32, -1)})


def test_a_damaged_file_is_rejected_and_stays(make_gguf: Make, tmp_path: Path) -> None:
    whole = make_gguf().read_bytes()
    path = tmp_path / "cut.gguf"
    for cut in (*range(0, 700, 21), len(whole) - 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError):
            rewrite(path, {"arte_edge.a": Field(UINT32, 1)})
        assert path.read_bytes() == whole[:cut]


def test_too_little_space_is_found_before_writing(make_gguf: Make, monkeypatch: Patch) -> None:
    path = make_gguf()
    usage = shutil.disk_usage(path.parent)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(ArteError, match="another copy of"):
        rewrite(path, {"arte_edge.a": Field(UINT32, 1)})
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_link_stays_a_link(make_gguf: Make, tmp_path: Path) -> None:
    path = make_gguf()
    link = tmp_path / "link.gguf"
    link.symlink_to(path)
    rewrite(link, {"arte_edge.a": Field(UINT32, 1)})
    assert link.is_symlink()
    assert values(path)["arte_edge.a"] == 1

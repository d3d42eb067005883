from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arte_edge.errors import ArteError, InputError
from arte_edge.models import LocalModel
from arte_edge.models.artifact_hash import checksums_of
from arte_edge.models.gguf_fields import Field, read_fields
from arte_edge.models.gguf_rewrite import rewrite
from arte_edge.publish.gguf_results import write_keys
from arte_edge.results.merge import merge_rows
from arte_edge.results.rows import QualityRow, SpeedRow
from arte_edge.results.student_json import FILE_NAME, read_student

gguf = pytest.importorskip("gguf")

STRING, UINT32, FLOAT32, BOOL, UINT64, ARRAY = 8, 4, 6, 7, 10, 9
NAME = "tiny-Q8_0.gguf"


def values(path: Path) -> dict[str, Any]:
    """Return the metadata as GGML's own reader sees it."""
    reader = gguf.GGUFReader(path)
    return {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, tuple[Any, bytes]]:
    return {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def test_keys_are_set_replaced_and_deleted_and_nothing_else_changes(make_gguf: Callable[..., Path]) -> None:
    path = make_gguf(general__name="old", arte_edge__bench__0__device="pi4", arte_edge__bench__count=1)
    before, weights = values(path), tensors(path)
    fields = {"general.name": Field(STRING, b"new"), "arte_edge.x": Field(UINT64, 1 << 40)}
    rewrite(path, fields, drop=("arte_edge.bench.",))
    gone = {"arte_edge.bench.0.device", "arte_edge.bench.count"}
    kept = {key: value for key, value in before.items() if key not in gone}
    assert values(path) == kept | {"general.name": "new", "arte_edge.x": 1 << 40}
    assert list(values(path))[: len(kept)] == list(kept)  # in their order
    assert tensors(path) == weights


def test_a_second_run_writes_nothing(make_gguf: Callable[..., Path]) -> None:
    path = make_gguf()
    fields = {"arte_edge.a": Field(FLOAT32, 0.1), "arte_edge.b": Field(BOOL, True)}
    assert rewrite(path, fields, drop=("arte_edge.",)).changed
    data, state = path.read_bytes(), path.stat()
    assert not rewrite(path, fields, drop=("arte_edge.",)).changed
    assert path.read_bytes() == data
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (state.st_mtime_ns, state.st_ino)


def test_the_sum_it_returns_is_that_of_the_file(make_gguf: Callable[..., Path]) -> None:
    path = make_gguf()
    before = checksums_of(path)
    done = rewrite(path, {"arte_edge.a": Field(STRING, b"x" * 100)})
    after = checksums_of(path)
    assert done.sha256 == after.sha256 != before.sha256
    assert after.tensor_sha256 == before.tensor_sha256


SCALARS = st.one_of(
    st.tuples(st.just("add_uint8"), st.integers(0, 255)),
    st.tuples(st.just("add_int8"), st.integers(-128, 127)),
    st.tuples(st.just("add_uint16"), st.integers(0, 65535)),
    st.tuples(st.just("add_int16"), st.integers(-(1 << 15), (1 << 15) - 1)),
    st.tuples(st.just("add_uint32"), st.integers(0, (1 << 32) - 1)),
    st.tuples(st.just("add_int32"), st.integers(-(1 << 31), (1 << 31) - 1)),
    st.tuples(st.just("add_uint64"), st.integers(0, (1 << 64) - 1)),
    st.tuples(st.just("add_int64"), st.integers(-(1 << 63), (1 << 63) - 1)),
    st.tuples(st.just("add_float32"), st.floats(width=32, allow_nan=False)),
    st.tuples(st.just("add_float64"), st.floats(allow_nan=False)),
    st.tuples(st.just("add_bool"), st.booleans()),
    st.tuples(st.just("add_string"), st.text(max_size=20)),
    st.tuples(st.just("add_array"), st.lists(st.text(max_size=5), min_size=1, max_size=4)),
    st.tuples(st.just("add_array"), st.lists(st.integers(-9, 9), min_size=1, max_size=4)),
    st.tuples(st.just("add_array"), st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4)),
    st.tuples(st.just("add_array"), st.lists(st.booleans(), min_size=1, max_size=4)),
)
KEYS = st.from_regex(r"[a-z]{1,6}(\.[a-z0-9_]{1,6}){1,2}", fullmatch=True)
FIELDS = st.one_of(
    st.builds(Field, st.just(STRING), st.text(max_size=30).map(str.encode)),
    st.builds(Field, st.just(UINT32), st.integers(0, (1 << 32) - 1)),
    st.builds(Field, st.just(BOOL), st.booleans()),
    st.builds(Field, st.just(FLOAT32), st.floats(width=32, allow_nan=False)),
    st.builds(
        Field, st.just(ARRAY), st.lists(st.text(max_size=5).map(str.encode), min_size=1), st.just(STRING)
    ),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    before, weights = values(path), tensors(path)
    rewrite(path, fields)
    want = {key: field.value for key, field in fields.items()}
    text = {
        key: [v.decode() for v in value]
        if isinstance(value, list)
        else value.decode()
        if isinstance(value, bytes)
        else value
        for key, value in want.items()
    }
    assert values(path) == before | text
    assert tensors(path) == weights
    assert all(t.data_offset % (alignment or 32) == 0 for t in gguf.GGUFReader(path).tensors)
    data = path.read_bytes()
    rewrite(path, fields)
    assert path.read_bytes() == data
    rewrite(path, {}, drop=tuple(fields))
    left = {key: value for key, value in before.items() if key not in fields}
    assert values(path) == left


@pytest.mark.parametrize("key", ["general.alignment", "general.architecture", "", "a b", "a..b", "ä.b"])
def test_a_key_that_must_not_be_set_is_refused(make_gguf: Callable[..., Path], key: str) -> None:
    path = make_gguf()
    data = path.read_bytes()
    with pytest.raises(InputError, match="cannot be set"):
        rewrite(path, {key: Field(UINT32, 1)})
    assert path.read_bytes() == data


def test_a_value_that_does_not_fit_is_refused(make_gguf: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"arte_edge\.a: cannot be written"):
        rewrite(make_gguf(), {"arte_edge.a": Field(UINT32, -1)})


def test_a_damaged_file_is_refused_and_stays(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    whole = make_gguf().read_bytes()
    path = tmp_path / "cut.gguf"
    for cut in (*range(0, 700, 7), len(whole) - 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError):
            rewrite(path, {"arte_edge.a": Field(UINT32, 1)})
        assert path.read_bytes() == whole[:cut]


def test_a_full_disk_is_told_before_anything_is_written(
    make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_gguf()
    usage = shutil.disk_usage(path.parent)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(ArteError, match="are needed beside it"):
        rewrite(path, {"arte_edge.a": Field(UINT32, 1)})
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_write_that_fails_midway_leaves_the_old_file(
    make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_gguf()
    data = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArteError, match="disk is full"):
        rewrite(path, {"arte_edge.a": Field(UINT32, 1)})
    assert path.read_bytes() == data
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_link_stays_a_link(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    path = make_gguf()
    link = tmp_path / "link.gguf"
    link.symlink_to(path)
    rewrite(link, {"arte_edge.a": Field(UINT32, 1)})
    assert link.is_symlink()
    assert values(path)["arte_edge.a"] == 1


def test_results_stand_in_the_file_and_its_sum_in_the_document(
    export_folder: Path, speed_row: Callable[..., SpeedRow], quality_row: Callable[..., QualityRow]
) -> None:
    rows = [speed_row("tg128", 20.5), speed_row("pp512", 150.0), quality_row(80)]
    merge_rows(export_folder, rows)
    assert write_keys(export_folder) == (NAME,)
    found = values(export_folder / NAME)
    bench = {key.removeprefix("arte_edge.bench."): v for key, v in found.items() if "arte_edge.bench" in key}
    assert bench["count"] == 1
    assert (bench["0.device"], bench["0.threads"]) == ("raspberry-pi-5", 4)
    assert (bench["0.decode_tps"], bench["0.prefill_tps"]) == (20.5, 150.0)
    assert (bench["0.peak_rss_bytes"], bench["0.throttled"]) == (300_000_000, False)
    assert (bench["0.task"], bench["0.date"]) == ("home_intents", "2026-11-24")
    assert bench["0.accuracy"] == pytest.approx(0.8)
    assert found["arte_edge.fidelity.kl_mean"] == pytest.approx(0.0058)
    student = read_student(export_folder)
    assert student is not None
    sums = checksums_of(export_folder / NAME)
    assert (student.artifacts[0].sha256, student.artifacts[0].size_bytes) == (sums.sha256, sums.size_bytes)
    assert student.artifacts[0].tensor_sha256 == sums.tensor_sha256
    assert write_keys(export_folder) == ()
    # and what is measured from now on still finds its file
    (speed,) = merge_rows(export_folder, [speed_row("tg128", 21.0, test_time="2027")]).artifacts[0].speeds
    assert speed.decode_tokens_per_s == 21.0


def test_throttled_rates_and_partial_accuracies_stay_out_of_the_file(
    export_folder: Path, speed_row: Callable[..., SpeedRow], quality_row: Callable[..., QualityRow]
) -> None:
    merge_rows(export_folder, [speed_row(throttled=True), quality_row(8, n=10, partial=True)])
    write_keys(export_folder)
    assert not [key for key in values(export_folder / NAME) if key.startswith("arte_edge.bench.")]
    write_keys(export_folder, allow_throttled=True)
    found = values(export_folder / NAME)
    assert found["arte_edge.bench.0.throttled"] is True
    assert "arte_edge.bench.0.accuracy" not in found
    write_keys(export_folder)  # and they go again
    assert "arte_edge.bench.count" not in values(export_folder / NAME)


def test_another_files_results_are_not_written_into_it(
    export_folder: Path, make_gguf: Callable[..., Path]
) -> None:
    shutil.copy(make_gguf("other.gguf", rows=32), export_folder / NAME)
    before = (export_folder / NAME).read_bytes(), (export_folder / FILE_NAME).read_bytes()
    with pytest.raises(InputError, match="its tensors are not those"):
        write_keys(export_folder)
    assert before == ((export_folder / NAME).read_bytes(), (export_folder / FILE_NAME).read_bytes())


@pytest.mark.model
def test_llama_cpp_loads_the_rewritten_file_and_answers_the_same(smollm2: LocalModel, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    assert smollm2.gguf is not None
    path = tmp_path / "model.gguf"
    shutil.copyfile(smollm2.gguf, path)

    def answer() -> str:
        model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
        try:
            return str(model("The capital of France is", max_tokens=8, temperature=0)["choices"][0]["text"])
        finally:
            model.close()

    before, sums = answer(), checksums_of(path)
    keys = {f"arte_edge.bench.{i}.device": Field(STRING, b"raspberry-pi-5") for i in range(40)}
    rewrite(path, keys)
    assert checksums_of(path).tensor_sha256 == sums.tensor_sha256
    assert set(keys) < set(read_fields(path).fields)
    assert answer() == before

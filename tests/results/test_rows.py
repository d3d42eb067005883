"""bench.jsonl keeps every row that was written whole, whatever happened to the last one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arte_edge.errors import InputError
from arte_edge.results.rows import DeviceFacts, QualityRow, Reading, SpeedRow, append_rows, read_rows

finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
devices = st.builds(
    DeviceFacts,
    fingerprint=texts,
    cpu=texts,
    arch=texts,
    cores=st.integers(1, 64),
    memory_bytes=st.integers(0, 1 << 40),
    features=st.lists(texts, max_size=3).map(tuple),
)
speeds = st.builds(
    SpeedRow,
    test=texts,
    model_filename=texts,
    model_size=st.integers(0, 1 << 40),
    format=st.sampled_from(["gguf", "onnx", "null"]),
    n_threads=st.integers(1, 64),
    n_prompt=st.integers(0, 9999),
    n_gen=st.integers(0, 9999),
    status=st.sampled_from(["ok", "crashed", "timeout"]),
    reason=texts,
    samples_ts=st.lists(finite, max_size=3).map(tuple),
    itl_samples_ms=st.lists(st.lists(finite, max_size=2).map(tuple), max_size=2).map(tuple),
    readings=st.lists(st.builds(Reading, t_s=finite, temperature_c=finite | st.none()), max_size=2).map(
        tuple
    ),
    device=devices,
)
qualities = st.builds(
    QualityRow,
    model_filename=texts,
    format=st.just("gguf"),
    n_threads=st.integers(1, 8),
    task=texts,
    split=st.sampled_from(["test", "validation"]),
    n=st.integers(0, 99),
    right=st.integers(0, 99),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
    answers=st.lists(st.tuples(texts, texts, st.booleans()), max_size=2).map(tuple),
    device=devices,
)
rows = st.lists(speeds | qualities, max_size=4)


@settings(max_examples=60)
@given(before=rows, after=rows, torn=st.integers(0, 300))
def test_rows_come_back_and_a_torn_last_line_costs_only_itself(
    tmp_path_factory: pytest.TempPathFactory,
    before: list[SpeedRow | QualityRow],
    after: list[SpeedRow | QualityRow],
    torn: int,
) -> None:
    path = tmp_path_factory.mktemp("rows") / "bench.jsonl"
    append_rows(path, before)
    assert read_rows(path) == before
    left = list(before)
    if before and torn:
        data = path.read_bytes()
        last = data.rstrip(b"\n").rpartition(b"\n")[2]
        cut = min(torn, len(last))
        path.write_bytes(data[: len(data) - 1 - cut])  # with the newline at least one byte of the row is gone
        left = before[:-1]
        assert read_rows(path) == left
    append_rows(path, after)
    if after or not torn:
        assert read_rows(path) == left + after


def test_a_row_without_its_newline_is_whole(tmp_path: Path, pi5: DeviceFacts) -> None:
    path = tmp_path / "bench.jsonl"
    row = SpeedRow(
        test="pp1",
        model_filename="a",
        model_size=1,
        format="gguf",
        n_threads=1,
        n_prompt=1,
        n_gen=0,
        device=pi5,
    )
    append_rows(path, [row])
    path.write_bytes(path.read_bytes().rstrip())  # some editors do that
    assert read_rows(path) == [row]
    append_rows(path, [row])
    assert read_rows(path) == [row, row]


def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, pi5: DeviceFacts) -> None:
    path = tmp_path / "bench.jsonl"
    assert read_rows(path) == []
    row = SpeedRow(
        test="pp1",
        model_filename="a",
        model_size=1,
        format="gguf",
        n_threads=1,
        n_prompt=1,
        n_gen=0,
        device=pi5,
    )
    append_rows(path, [row, row])
    good = path.read_text()
    for text, words in (
        ("{\n" + good, ":1: not a JSON object"),
        (good.replace('"schema_version":2', '"schema_version":9'), ":1: schema_version is 9"),
        (good.replace('"n_threads":1', '"n_threads":0'), ":1: n_threads"),
        (good + '{"schema_version": 1}\n', ":3: task"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            read_rows(path)

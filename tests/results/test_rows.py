"""bench.jsonl keeps every row that was written whole, whatever happened to the last one."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Folders, Patch, speed_row

from arte_edge.errors import ArteError, InputError
from arte_edge.results.rows import DeviceFacts, QualityRow, Reading, Row, SpeedRow, append_rows, read_rows

finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers, small = st.integers(0, 9999), st.integers(1, 64)
devices = st.builds(
    DeviceFacts, fingerprint=texts, cpu=texts, arch=texts, cores=small, memory_bytes=numbers,
    features=st.lists(texts, max_size=3).map(tuple),
)  # fmt: skip
readings = st.builds(Reading, t_s=finite, temperature_c=finite | st.none())
speeds = st.builds(
    SpeedRow, test=texts, model_filename=texts, model_size=numbers, format=st.sampled_from(["gguf", "onnx", "null"]),
    n_threads=small, n_prompt=numbers, n_gen=numbers, status=st.sampled_from(["ok", "crashed", "timeout"]),
    reason=texts, samples_ts=st.lists(finite, max_size=3).map(tuple), device=devices,
    itl_samples_ms=st.lists(st.lists(finite, max_size=2).map(tuple), max_size=2).map(tuple),
    readings=st.lists(readings, max_size=2).map(tuple),
)  # fmt: skip
qualities = st.builds(
    QualityRow, model_filename=texts, format=st.just("gguf"), n_threads=small, task=texts, n=numbers, right=numbers,
    split=st.sampled_from(["test", "validation"]), low=st.floats(0, 1), high=st.floats(0, 1), device=devices,
    answers=st.lists(st.tuples(texts, texts, st.booleans()), max_size=2).map(tuple),
)  # fmt: skip
rows = st.lists(speeds | qualities, max_size=4)


@settings(max_examples=60)
@given(before=rows, after=rows, torn=st.integers(0, 300))
def test_rows_come_back_and_a_torn_last_line_costs_only_itself(
    tmp_path_factory: Folders, before: list[Row], after: list[Row], torn: int
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


def test_a_row_without_its_newline_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    append_rows(path, [speed_row()])
    path.write_bytes(path.read_bytes().rstrip())  # some editors do that
    assert read_rows(path) == [speed_row()]
    append_rows(path, [speed_row()])
    assert read_rows(path) == [speed_row()] * 2


def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    assert read_rows(path) == []
    append_rows(path, [speed_row(), speed_row()])
    good = path.read_text()
    for text, named in (
        ("{\n" + good, ":1: not a JSON object"),
        (good.replace('"schema_version":2', '"schema_version":9'), ":1: schema_version is 9"),
        (good.replace('"n_threads":4', '"n_threads":0'), ":1: n_threads"),
        (good + '{"schema_version": 1}\n', ":3: n: Field"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=named):
            read_rows(path)


def test_a_full_disk_leaves_the_earlier_rows(tmp_path: Path, monkeypatch: Patch) -> None:
    path = tmp_path / "bench.jsonl"
    append_rows(path, [speed_row()])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArteError, match=r"bench\.jsonl: No space left"):
        append_rows(path, [speed_row()] * 2)
    assert read_rows(path) == [speed_row()]


def test_two_that_append_at_the_same_moment_keep_each_others_rows(tmp_path: Path, monkeypatch: Patch) -> None:
    path, whole_open = tmp_path / "bench.jsonl", Path.open
    other = threading.Thread(target=append_rows, args=(path, [speed_row("pp512")]))

    def meanwhile(file: Path, *args: Any, **more: Any) -> Any:
        if args == ("ab",) and other.ident is None:  # between the first one's look at the file and its writing
            other.start()
            other.join(0.5)
        return whole_open(file, *args, **more)

    append_rows(path, [speed_row("tg8")])
    monkeypatch.setattr(Path, "open", meanwhile)
    append_rows(path, [speed_row("tg128")])
    other.join()
    assert sorted(row.test for row in read_rows(path) if isinstance(row, SpeedRow)) == ["pp512", "tg128", "tg8"]

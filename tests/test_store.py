"""The run folder survives whatever kills the process: torn files, a full disk, a changed stage."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Patch

from arte_edge.cache import write_atomic
from arte_edge.errors import ArteError
from arte_edge.store import CallLog, Stage, content_key, read_jsonl, write_jsonl

Row = dict[str, Any]

# A lone surrogate too: a server that cuts an emoji in half sends one.
letters = st.sampled_from('ab\n\r"\\\x00\x85é€\u2028🙂\ud83d')
texts = st.lists(st.lists(st.text(letters, max_size=12), min_size=1, max_size=4), max_size=5)


def groups_of(drawn: list[list[str]]) -> list[list[Row]]:
    return [
        [{"key": f"{g}.{i}", "status": "ok", "text": text} for i, text in enumerate(group)]
        for g, group in enumerate(drawn)
    ]


def held(log: CallLog, groups: list[list[Row]]) -> list[list[str | None]]:
    """Return what the log holds of each row of each group."""
    found = [[log.get(row["key"]) for row in group] for group in groups]
    return [[None if row is None else row["text"] for row in group] for group in found]


@settings(max_examples=60)
@given(drawn=texts, where=st.floats(0, 1))
def test_a_file_cut_at_any_byte_reads_back_as_its_whole_groups(drawn: list[list[str]], where: float) -> None:
    groups = groups_of(drawn)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calls.jsonl"
        log = CallLog(path)
        ends = [0]
        for group in groups:
            log.append(group)
            ends.append(path.stat().st_size)
        log.close()
        cut = round(where * ends[-1])
        path.write_bytes(path.read_bytes()[:cut])

        whole = max(n for n, end in enumerate(ends) if end <= cut)
        again = CallLog(path)
        expected = [[row["text"] if g < whole else None for row in group] for g, group in enumerate(groups)]
        assert held(again, groups) == expected
        assert path.stat().st_size == ends[whole]

        for group in groups[whole:]:
            again.append(group)
        again.close()
        last = CallLog(path)
        assert held(last, groups) == drawn
        last.close()


def test_an_error_row_is_kept_but_is_not_done(tmp_path: Path) -> None:
    log = CallLog(tmp_path / "calls.jsonl")
    log.append([{"key": "a", "status": "error", "text": ""}, {"key": "b", "status": "ok", "text": "fine"}])
    assert log.get("a") is None and log.get("b") is not None and len(log) == 1
    log.close()
    again = CallLog(tmp_path / "calls.jsonl")
    assert again.get("a") is None and len(again) == 1
    again.append([{"key": "a", "status": "ok", "text": "now"}])
    again.close()
    rows = read_jsonl(tmp_path / "calls.jsonl")
    assert [(row["key"], row["status"]) for row in rows] == [("a", "error"), ("b", "ok"), ("a", "ok")]


@pytest.mark.parametrize(
    "damage",
    [b"{not json", b'["a list"]', b'{"no": "key"}', b"\xff\xfe", b"[" * 5000, b'{"key":[],"left":0}']
    + [b'{"key":"b","left":0,%s}' % more for more in (b'"text":1', b'"finish":null', b'"logp":[["a"]]', b'"logp":1')],
)
def test_a_damaged_middle_line_is_refused_with_its_number(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "calls.jsonl"
    log = CallLog(path)
    for group in groups_of([["one"], ["two"], ["three"]]):
        log.append(group)
    log.close()
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2], b""]))
    with pytest.raises(ArteError, match=r"calls\.jsonl:2: ") as caught:
        CallLog(path)
    assert "Delete the line" in caught.value.hint

    path.write_bytes(b"\n".join([lines[0], lines[2], b""]))  # what the hint says to do
    log = CallLog(path)
    assert [log.get(key) is not None for key in ("0.0", "1.0", "2.0")] == [True, False, True]
    log.close()


FULL_DISK = """
import resource, sys
from pathlib import Path
from arte_edge.errors import ArteError
from arte_edge.cache import write_atomic
from arte_edge.store import CallLog

folder = Path(sys.argv[1])
path = folder / "calls.jsonl"
log = CallLog(path)
log.append([{"key": "small", "status": "ok", "text": "x"}])
size = path.stat().st_size
big = [{"key": f"big {i}", "status": "ok", "text": "y" * 500} for i in range(8)]
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1300, hard))

try:
    log.append(big)
    sys.exit("the append went through")
except ArteError as error:
    assert "the disk is full" in error.message and str(path) in error.message, error
    assert "same command" in error.hint, error
assert path.stat().st_size == size, "the file grew"
assert log.get("big 0") is None
try:
    write_atomic(folder / "manifest.json", b"z" * 5000)
    sys.exit("the write went through")
except ArteError as error:
    assert "the disk is full" in error.message, error
assert sorted(p.name for p in folder.iterdir()) == ["calls.jsonl"]

resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.append(big)
log.close()
again = CallLog(path)
assert len(again) == 9 and again.get("big 7")["text"] == "y" * 500
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_disk_that_fills_in_mid_write_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_failed_atomic_write_keeps_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: Patch) -> None:
    path = tmp_path / "data.jsonl"
    write_atomic(path, b"old")

    def fails(self: Path, target: Path) -> Path:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(ArteError, match="input/output"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@settings(max_examples=40)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers() | st.none())))
def test_written_rows_read_back(rows: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_jsonl(path, rows)
        assert read_jsonl(path) == rows


def test_a_damaged_data_file_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ArteError, match=r"rows\.jsonl:2: not a JSON object"):
        read_jsonl(tmp_path / "rows.jsonl")


class TestStage:
    def finished(self, folder: Path, inputs: Any = ("a", 1)) -> Stage:
        stage = Stage(folder, inputs)
        stage.write("rows.jsonl", [{"n": 1}, {"n": 2}])
        stage.write("rejected.jsonl", [])
        stage.finish({"rows": 2})
        return stage

    def test_a_stage_is_done_once_finished_and_says_what_it_found(self, tmp_path: Path) -> None:
        assert Stage(tmp_path / "elicit", ("a", 1)).todo
        for stage in (self.finished(tmp_path / "elicit"), Stage(tmp_path / "elicit", ("a", 1))):
            assert not stage.todo and stage.summary == {"rows": 2}
            assert sorted(stage.files) == ["rejected.jsonl", "rows.jsonl"]

    def test_other_inputs_make_it_again(self, tmp_path: Path) -> None:
        self.finished(tmp_path)
        assert Stage(tmp_path, ("a", 2)).todo and not Stage(tmp_path, ("a", 1)).todo

    def test_a_changed_or_missing_file_makes_it_again(self, tmp_path: Path) -> None:
        self.finished(tmp_path)
        (tmp_path / "rows.jsonl").write_text('{"n": 3}\n')
        assert Stage(tmp_path, ("a", 1)).todo
        self.finished(tmp_path)
        assert not Stage(tmp_path, ("a", 1)).todo
        (tmp_path / "rejected.jsonl").unlink()
        assert Stage(tmp_path, ("a", 1)).todo

    @pytest.mark.parametrize("manifest", ["", "{", "[]", '{"inputs": "other"}', '{"inputs": "I"}', "[" * 9000])
    def test_a_manifest_that_is_none_makes_it_again(self, tmp_path: Path, manifest: str) -> None:
        stage = self.finished(tmp_path)
        (tmp_path / "manifest.json").write_text(manifest.replace("I", stage.inputs))
        assert Stage(tmp_path, ("a", 1)).todo


def test_a_content_key_depends_on_content_alone() -> None:
    assert content_key({"a": 1, "b": [1, 2]}, "é") == content_key({"b": [1, 2], "a": 1}, "é")
    assert content_key("a", "b") != content_key("ab") != content_key("b", "a")
    assert content_key(1) != content_key("1")
    # Runs of older versions must stay resumable: this is the key of a format, not of a build.
    expected = "cc12deedaa693339961e55ef8e61dc5e2b2fd912ccdbf6d8d039c448835040e4"
    assert content_key("complete", {"seed": 0}) == expected


@given(st.text(letters, max_size=20))
def test_any_text_has_a_key(text: str) -> None:
    assert content_key(text) == content_key(text) != content_key(text + "x")

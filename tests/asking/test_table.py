"""Questions from a table: every cell comes back, a killed command continues, and no two tables are mixed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from tiny import Folders, Patch

import arte_edge as ae
from arte_edge.asking.ask import Student
from arte_edge.asking.table import journal_of
from arte_edge.errors import InputError

pytest.importorskip("llama_cpp")

ODD = ['say "hi", then; go', "two\nlines", "carriage\rreturn", "both\r\nof them", " blanks ", "=1+1", "é 😀\u2028x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: Folders) -> Path:
    return tiny.write_gguf(tmp_path_factory.mktemp("model") / "tiny-F16.gguf")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("ARTE_EDGE_HOME", str(tmp_path / "home"))


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    return path


def read_csv(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, strict=True))


def test_every_cell_comes_back_as_it_was_with_an_answer(model: Path, tmp_path: Path) -> None:
    rows = [["id", "text", "answer"], *([f"00{i}", text, "mine"] for i, text in enumerate(ODD)), ["9", " ", ""]]
    table = write_csv(tmp_path / "in.csv", rows)
    done = ae.ask_file(model, table, tmp_path / "out.csv", max_tokens=3, with_text=True)
    found = read_csv(done.out)
    assert [row[:3] for row in found] == rows
    assert found[0][3:] == ["student_answer", "student_text"]
    assert [row[3] for row in found[1:-1]] == [str(ae.ask(model, text, max_tokens=3).answer or "") for text in ODD]
    assert found[-1][3:] == ["", ""]
    assert (done.rows, done.empty, done.failed, done.new) == (8, 1, 0, 7)
    assert "8 rows" in str(done) and "1 with an empty cell" in str(done)


def test_a_table_of_one_column_and_json_lines_either_way(model: Path, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("whatever\nfirst\nsecond\n")
    rows = [{"n": 1, "text": "first", "more": [1.5, None]}, {"text": "second", "late": True}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ae.ask_file(model, tmp_path / "one.csv", tmp_path / "a.jsonl", max_tokens=3)
    ae.ask_file(model, tmp_path / "in.jsonl", tmp_path / "b.jsonl", max_tokens=3)
    ae.ask_file(model, tmp_path / "in.jsonl", tmp_path / "c.csv", max_tokens=3)
    a, b = (list(map(json.loads, (tmp_path / f"{n}.jsonl").read_text("utf-8").splitlines())) for n in "ab")
    answers = [row.pop("answer") for row in b]
    assert b == rows and all(answers)
    assert a == [{"whatever": row["text"], "answer": x} for row, x in zip(rows, answers, strict=True)]
    assert read_csv(tmp_path / "c.csv") == [
        ["n", "text", "more", "late", "answer"],
        ["1", "first", "[1.5, null]", "", answers[0]],
        ["", "second", "", "true", answers[1]],
    ]


def test_a_question_too_long_is_counted_and_the_others_are_answered(model: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "in.csv", [["text"], ["first"], ["q" * 5000]])
    done = ae.ask_file(model, table, tmp_path / "out.csv", max_tokens=3)
    assert (done.answered, done.failed) == (1, 1) and "too long" in str(done)
    assert read_csv(done.out)[2] == ["q" * 5000, ""]


def test_a_finished_table_is_not_answered_again_and_no_other_takes_its_place(
    model: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    table, out = write_csv(tmp_path / "in.csv", [["text"], ["first"], ["first"]]), tmp_path / "out.csv"
    assert ae.ask_file(model, table, out, max_tokens=3).new == 1
    content = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.delattr(Student, "ask")
        assert ae.ask_file(model, table, out, max_tokens=3).new == 0
        for source, settings in {"in.csv": {"max_tokens": 4}, "other.csv": {"max_tokens": 3}}.items():
            (tmp_path / "other.csv").write_text("text\nsecond\n")
            with pytest.raises(InputError, match=r"belongs to another command, with another (max_tokens|table)"):
                ae.ask_file(model, tmp_path / source, out, **settings)  # type: ignore[arg-type]
    journal_of(out).unlink()
    with pytest.raises(InputError, match=r"out\.csv: there already"):
        ae.ask_file(model, table, out, max_tokens=3)
    assert out.read_bytes() == content


def test_what_cannot_be_read_or_written_is_said_before_anything_runs(
    model: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.delattr(Student, "ask")
    (tmp_path / "in.csv").write_text("id,a\n1,first\n")
    (tmp_path / "list.jsonl").write_text('{"text": ["no text"]}\n')
    for table, out, column, said in (
        ("in.csv", "out.csv", None, "which column is the input is not clear"),
        ("in.csv", "out.csv", "b", "no column 'b'"),
        ("in.csv", "out.xlsx", "a", "not a known kind of table"),
        ("in.csv", "in.csv", "a", "the table itself"),
        ("none.csv", "out.csv", "a", "no such file"),
        ("list.jsonl", "out.csv", "text", r"list.jsonl:1: 'text' is not a text"),
    ):
        with pytest.raises(InputError, match=said):
            ae.ask_file(model, tmp_path / table, tmp_path / out, column=column)
    assert (tmp_path / "in.csv").read_text() == "id,a\n1,first\n"


@pytest.fixture
def command(model: Path, tmp_path: Path) -> Iterator[list[str]]:
    table = write_csv(tmp_path / "in.csv", [["text"], *([f"question {i}"] for i in range(60))])
    words = ["ask", str(model), "--file", str(table), "-o", str(tmp_path / "out.csv"), "--max-tokens", "24"]
    yield [sys.executable, "-m", "arte_edge", *words]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9")
def test_a_killed_table_continues_and_asks_nothing_twice(command: list[str], tmp_path: Path) -> None:
    out, kept = tmp_path / "out.csv", 0
    journal = journal_of(out)
    for _ in range(2):
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not journal.exists() or journal.read_bytes().count(b"\n") < kept + 8:
            assert child.poll() is None
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert not out.exists()
        kept = journal.read_bytes().count(b"\n")
    with journal.open("ab") as file:
        file.write(b'{"input": "question 59", "answ')  # cut short, as by a full disk
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = list(map(json.loads, journal.read_text("utf-8").splitlines()))[1:]
    assert [row["input"] for row in rows] == [f"question {i}" for i in range(60)]
    assert f"{60 - (kept - 1)} of them now" in done.stderr
    assert [row[1] for row in read_csv(out)[1:]] == [row["answer"] for row in rows]

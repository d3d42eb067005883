"""Labelled tables: formats, encodings, delimiters, columns, cells that are missing."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import Patch

from arte_edge.errors import ArteError, InputError
from arte_edge.tasks.tables import json_rows, read_table
from arte_edge.tasks.task import Problem

LABELS = ("light", "005", "1.50", "true", "NA")
ROWS = list(zip(("turn on, please", 'say "hi"\nnow', "warmer; quick", "x", "y" * 9**6), LABELS, strict=True))
NAMED = [{"text": text, "label": label} for text, label in ROWS]


def write_csv(path: Path, rows: Any = ROWS, header: Any = ("text", "label"), **options: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, **options).writerows([header, *rows])
    return path


def write(path: Path) -> Path:
    """Write `ROWS` in the format that the name of `path` ends with."""
    if path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow", reason="pyarrow is not installed").Table
        pytest.importorskip("pyarrow.parquet").write_table(table.from_pylist(NAMED), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"version": 1, "rows": NAMED} if "object" in path.name else NAMED))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\r\n" for row in NAMED), encoding="utf-8-sig")
    else:
        usual = "\t" if path.suffix == ".tsv" else ","
        write_csv(path, delimiter={"semi": ";", "tab": "\t"}.get(path.stem, usual))
    return path


@pytest.mark.parametrize(
    "name", ["t.csv", "semi.csv", "tab.csv", "t.tsv", "T.CSV", "t.jsonl", "t.json", "object.json", "t.parquet"]
)
def test_every_format_gives_the_cells_as_written(tmp_path: Path, name: str) -> None:
    table = read_table(write(tmp_path / name))
    assert [record[1:] for record in table.records] == ROWS
    assert (table.n_rows, table.columns) == (5, ("text", "label"))
    guessed = ["cells separated by"] if name in ("semi.csv", "tab.csv") else []
    for note, part in zip(table.notes, [*guessed, "columns guessed by name"], strict=True):
        assert part in note
    assert read_table(tmp_path / name, ("text", "label")).records == table.records


def test_numbers_of_json_are_as_written_and_typed_cells_of_parquet_are_text(tmp_path: Path) -> None:
    cells = ("1.50", "1e3", "true", '"NaN"', "NaN", "null")
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "x", "label": {cell}}}\n' for cell in cells))
    table = read_table(tmp_path / "t.jsonl")
    assert [target for _, _, target in table.records] == ["1.50", "1e3", "True", "NaN"]
    assert table.notes[1] == "dropped 2 rows without an answer (lines 5, 6)"
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    typed = pyarrow.table({"text": ["a", "b", "c", "d"], "label": [1.5, None, float("nan"), 2.0]})
    pytest.importorskip("pyarrow.parquet").write_table(typed, tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    assert [(line, target) for line, _, target in table.records] == [(0, "1.5"), (3, "2.0")]


def test_rows_with_missing_cells_are_dropped_and_named(tmp_path: Path) -> None:
    rows = [("a", "x"), ("two\nlines", ""), (" ", "x"), ("", ""), ("b", " x "), ()]
    table = read_table(write_csv(tmp_path / "t.csv", [*rows, ("c", "y", "z"), ("d", "x", "")]))
    assert [record[0] for record in table.records] == [2, 7, 10]
    assert [str(problem) for problem in table.bad] == ["t.csv:9: 3 cells, where the first line has 2"]
    assert table.notes[1:] == [
        "blanks around the answer left out in 1 row (line 7)",
        "dropped 1 row without an input (line 5)",
        "dropped 1 row without an answer (line 3)",
        "dropped 2 rows without anything (lines 6, 8)",
    ]


@pytest.mark.parametrize("header", ["text,sentence,x", "text,label,label", "text,tag,x", "turn on the lamp,light"])
def test_columns_are_guessed_only_where_one_fits(tmp_path: Path, header: str) -> None:
    with pytest.raises(InputError, match="is not clear") as caught:
        read_table(write_csv(tmp_path / "t.csv", [["cell"] * 4], header.split(",")))
    assert header.replace(",", ", ") in caught.value.hint and "--input" in caught.value.hint
    for names, columns in (("id,Query,Intent", ("Query", "Intent")), ("text,input,target", ("input", "target"))):
        assert read_table(write_csv(tmp_path / "t.csv", [["x"] * 3], names.split(","))).columns == columns


@pytest.mark.parametrize(
    ("name", "data", "message", "hint"),
    [
        ("t.csv", b"text,label\na,b\n", "t.csv: no column 'q'", "Its columns: text, label"),
        ("t.csv", b"text,q,q\na,b,c\n", "t.csv: several columns 'q'", ""),
        ("t.csv", b"", "t.csv: not a table with two columns", "(empty)"),
        ("t.csv", b"q\nx\n", "t.csv: not a table with two columns", "Commas, semicolons and tabs"),
        ("t.csv", b'q,label\na,b\n"never closed,c\nd,e\n', "t.csv:3: not CSV", "doubled"),
        ("t.csv", b"q,label\n\xe9,b\n", "t.csv:2: not UTF-8 (byte 0xe9)", "iconv -f CP1252"),
        ("t.csv", "q,label\na,b\n".encode("utf-16-le"), "t.csv: UTF-16", "iconv -f UTF-16LE"),
        ("a b.csv", "q,label\na,b\n".encode("utf-16"), "a b.csv: UTF-16", "a b-utf8.csv'"),
        ("t.csv", b"q,label\n\0\1\2,bbbbbbbbbbbbbbbbbbbb", "t.csv: binary", ""),
        ("t.json", b"{", "t.json: not JSON", ""),
        ("t.json", b"[" * 99999, "t.json: not JSON", ""),
        ("t.json", b'{"a": 1}', "t.json: not an array", "[{"),
        ("t.jsonl", b'{"q": "\\udc00"}', "t.jsonl:1: holds half of a character", "Write all"),
        ("t.parquet", b"PAR1 and more", "t.parquet: not a readable Parquet", ""),
        ("t.xlsx", b"PK", "not a known kind of table", "CSV in UTF-8"),
        ("none/t.csv", None, "no such file", ""),
    ],
)
def test_what_is_no_table_is_an_input_error(
    tmp_path: Path, name: str, data: bytes | None, message: str, hint: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    with pytest.raises(InputError) as caught:
        read_table(tmp_path / name, ("q", "label"))
    assert message in caught.value.message and hint in caught.value.hint


def test_a_row_that_is_no_object_or_no_text_is_named(tmp_path: Path) -> None:
    lines = ['{"text": ["x"], "label": "a"}', "[1]", '{"text": "\\udc00", "label": "a"}', "{"]
    lines.append('{"text": "b", "label": "c"}')
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    table = read_table(tmp_path / "t.jsonl")
    assert [problem.where for problem in table.bad] == [f"t.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert table.records == [(5, "b", "c")]
    assert sum(isinstance(value, Problem) for _, value in json_rows(tmp_path / "t.jsonl")) == 3


def test_without_pyarrow_the_hint_is_a_pip_command(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr("arte_edge.tasks.tables.find_spec", lambda _name: None)
    with pytest.raises(ArteError) as caught:
        read_table(tmp_path / "t.parquet")
    assert caught.value.hint == "pip install 'arte-edge[train]'"

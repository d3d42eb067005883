"""Read labelled tables: CSV, TSV, JSONL, a JSON array or Parquet, every cell as text.

Nothing is typed: ``005``, ``1.50``, ``true`` and ``NA`` are these texts. Missing is only an empty or blank cell, JSON's
``null`` and ``NaN`` and Parquet's null; such rows are dropped and listed. `Table.notes` say what was guessed.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from arte_edge.errors import ArteError, InputError, nearest
from arte_edge.tasks.task import Problem, raise_first

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_USUAL = (
    ("input", "text", "sentence", "question", "utterance", "query", "message", "prompt", "instruction"),
    ("target", "label", "intent", "category", "answer", "class", "output", "response", "sentiment", "topic"),
)
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_SAMPLE_LINES = 200
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a pair with which JSON writes one character

# (line, input, answer): lines count from 1, rows from 0. A plain tuple, because tables may have millions.
Record = tuple[int, str, str]
Columns = tuple[str | None, str | None]  # of input and answer; None: guessed by name
GUESSED: Columns = (None, None)


Row = Mapping[str, object] | list[str]  # by column, or in the order of the columns


class Source(NamedTuple):
    """An opened table: the names of its columns, and its rows by column or what is wrong with them."""

    columns: Sequence[str]
    rows: Iterable[tuple[int, Row | Problem]]
    by_line: bool = False
    form: str = ""  # what separates the cells of a CSV


@dataclass
class Table:
    """The rows of a table that have an input and an answer; the `bad` ones are unreadable."""

    name: str
    records: list[Record]
    columns: tuple[str, str] = ("input", "target")
    by_line: bool = False
    form: str = ""
    n_rows: int = 0
    bad: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def where(self, line: int) -> str:
        """Return the place of a row in the form of error messages."""
        return f"{self.name}:{line}" if self.by_line else f"{self.name}[{line}]"


def noted(what: str, lines: Sequence[int], by_line: bool, why: str = "") -> list[str]:
    """Return a note on what was done to `lines`, if there are any."""
    kind, s = "line" if by_line else "row", "s" if len(lines) > 1 else ""
    shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
    return [f"{what} {len(lines):,} row{s} {why}({kind}{s} {shown})"] if lines else []


def open_table(path: Path, name: str = "", *, least: int = 2, as_written: bool = True) -> Source:
    """Open the table `path` in the format that `name`, else its own name, ends with; errors as `read_table`.

    Args:
        least: columns that a CSV must have at least.
        as_written: numbers of JSON are texts as in the file.
    """
    suffix = Path(name or path.name).suffix.lower()
    if not path.is_file():
        answers = " and one of answers" if least > 1 else ""
        raise InputError(f"{path}: no such file", f"A table with a column of inputs{answers}.")
    if suffix not in SUFFIXES:
        hint = f"Known: {', '.join(SUFFIXES)}. Save a spreadsheet as CSV in UTF-8."
        raise InputError(f"{path}: not a known kind of table", hint)
    if suffix == ".parquet":
        if find_spec("pyarrow") is None:
            raise ArteError("Reading Parquet needs pyarrow", "pip install 'arte-edge[train]'")
        from pyarrow.parquet import ParquetFile

        return arrow_source(path.name, lambda: ParquetFile(path).iter_batches())
    raise_first([problem] if (problem := text_problem(path)) else [], str(path))
    if suffix in (".csv", ".tsv"):
        return _open_csv(path, "\t" if suffix == ".tsv" else ",", least)
    rows = enumerate(_json_array(path, as_written)) if suffix == ".json" else json_rows(path, as_written=as_written)
    first = list(islice(rows, _SAMPLE_LINES))
    columns = dict.fromkeys(key for _, row in first if isinstance(row, dict) for key in row)
    if not columns:
        raise_first([row for _, row in first if isinstance(row, Problem)][:1], str(path))
    return Source(list(columns), chain(first, rows), suffix != ".json")


def text_problem(path: Path) -> Problem | None:
    """Return why `path` is not a text in UTF-8, with or without byte order mark, and how to convert it."""
    number = 0
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            marked = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            # The letters of many languages have a zero byte in UTF-16.
            if marked or head.count(0) * 4 > len(head):
                encoding = "UTF-16" if marked or head[:1] == b"\0" else "UTF-16LE"
                return Problem(path.name, "UTF-16, not UTF-8", _convert(path, encoding))
            if b"\0" in head:
                return Problem(path.name, "binary, not a text in UTF-8")
            file.seek(0)
            for line in file:
                number += 1
                line.decode()
    except FileNotFoundError:
        return Problem(path.name, "this file is missing", f"It belongs in {path.parent}.")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        what = f"not UTF-8 ({byte}), probably Windows-1252 or another encoding of one byte a letter"
        return Problem(f"{path.name}:{number}", what, _convert(path, "CP1252"))
    except OSError as error:
        return Problem(path.name, f"cannot be read ({error.strerror})")
    return None


def _convert(path: Path, encoding: str) -> str:
    old, new = (shlex.quote(str(p)) for p in (path, path.with_name(f"{path.stem}-utf8{path.suffix}")))
    return f"Save it as UTF-8, or: iconv -f {encoding} -t UTF-8 {old} > {new}"


def json_rows(path: Path, *, as_written: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield the number and the JSON object, or `Problem`, of each line of `path` that is not blank.

    With `as_written`, numbers are texts as in the file, and ``NaN`` is None.
    """
    # Not splitlines: strings may hold the other line separators of Unicode.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield (number, _object(_decode(line, f"{path.name}:{number}", as_written), f"{path.name}:{number}"))


def _decode(text: str, where: str, as_written: bool) -> Any:
    try:
        value = (_AS_WRITTEN if as_written else _TYPED).decode(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Problem(where, "holds half of a character (\\ud800 to \\udfff alone)", "Write all of it.")
    except (ValueError, RecursionError) as error:
        hint = "Write texts in double quotes, and one object a line in a .jsonl file."
        return Problem(where, f"not JSON ({error})", hint)
    return value


def _constant(name: str) -> str | None:
    return None if name == "NaN" else name


_TYPED = json.JSONDecoder()


class _Number(str):
    """A number as it is written, which inside an object is one again."""

    __slots__ = ()


_AS_WRITTEN = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_constant)


def _object(value: Any, where: str) -> Any:
    wrong = Problem(where, 'not an object like {"input": "...", "target": "..."}')
    return value if isinstance(value, dict | Problem) else wrong


def _json_array(path: Path, as_written: bool) -> Iterator[Any]:
    """Yield the rows of a JSON file: of an array, or of the only array in an object."""
    value = _decode(path.read_text(encoding="utf-8-sig"), path.name, as_written)
    raise_first([value] if isinstance(value, Problem) else [], str(path))
    values = list(value.values()) if isinstance(value, dict) else [value]
    lists = [part for part in values if isinstance(part, list)]
    if len(lists) != 1:
        raise InputError(f"{path.name}: not an array of rows", 'Like [{"input": "…", "target": "…"}, …].')
    return (_object(row, f"{path.name}[{index}]") for index, row in enumerate(lists[0]))


def _open_csv(path: Path, usual: str, least: int) -> Source:
    csv.field_size_limit(2**31 - 1)  # a cell may hold a whole document; the default is 131,072
    with path.open(encoding="utf-8-sig", newline="") as file:
        sample = list(islice(file, _SAMPLE_LINES))
    delimiter = _delimiter(path.name, sample, usual if least == 1 and any(map(str.strip, sample)) else "")
    columns = [name.strip() for name in next(csv.reader(sample, delimiter=delimiter))]

    def rows() -> Iterator[tuple[int, Row | Problem]]:
        line, n = 0, len(columns)
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                for cells in reader:
                    begin, line = line + 1, reader.line_num
                    if len(cells) > n and any(map(str.strip, cells[n:])):
                        what = f"{len(cells)} cells, where the first line has {n}"
                        yield begin, Problem(f"{path.name}:{begin}", what)
                    elif begin > 1:
                        yield begin, cells
            except csv.Error as error:
                hint = 'Is a quote not closed? Inside a quoted cell it is doubled: "she said ""yes""".'
                raise InputError(f"{path.name}:{line + 1}: not CSV ({error})", hint) from error

    guessed = "" if delimiter == usual else " (guessed)"
    return Source(columns, rows(), True, f"separated by {_DELIMITERS[delimiter]}{guessed}")


def _delimiter(name: str, sample: Sequence[str], delimiter: str) -> str:
    """Return the delimiter with which most rows of `sample` have the columns of the first, at least two.

    `delimiter` is that of a table with one column, empty where one is not enough.
    """
    best = (0.0, 0)
    for candidate in _DELIMITERS:
        lengths = [len(row) for row in csv.reader(sample, delimiter=candidate) if row]
        if lengths and lengths[0] > 1:
            fit = (lengths.count(lengths[0]) / len(lengths), lengths[0])
            best, delimiter = max((best, delimiter), (fit, candidate))
    if not delimiter:
        first = sample[0].strip()[:60] if sample else "(empty)"
        hint = f"Commas, semicolons and tabs were tried. The first line, which names the columns: {first}"
        raise InputError(f"{name}: not a table with two columns", hint)
    return delimiter


def arrow_source(name: str, read: Callable[[], Iterable[Any]]) -> Source:
    """Return a source of the Arrow batches, or tables, that `read` gives; rows are numbered through."""

    from pyarrow import ArrowException

    columns: Sequence[str] = ()
    rows: list[Mapping[str, object]] = []
    try:
        for batch in read():
            columns = batch.schema.names
            cells = zip(*map(_cells, batch.columns), strict=True)
            rows += [dict(zip(columns, row, strict=True)) for row in cells]
    except (OSError, ValueError, ArrowException) as error:
        raise InputError(f"{name}: not a readable Parquet table ({str(error).strip():.200})") from error
    return Source(columns, enumerate(rows))


def _cells(column: Any) -> list[Any]:
    if not hasattr(column.type, "storage_type"):
        return list(column.to_pylist())
    # JSON: a text that is JSON by chance (1.50, true) is stored as it is, another one in quotes
    stored = column.cast(column.type.storage_type).to_pylist()
    return [json.loads(text) if str(text).startswith('"') else text for text in stored]


def read_table(
    source: Source | Path,
    columns: Columns = GUESSED,
    *,
    name: str = "",
    label_names: Mapping[str, Sequence[str]] | None = None,
) -> Table:
    """Return two columns of `source` as texts, numbers of `label_names` as names; without names they are guessed.

    Raises:
        InputError: no such file or column, or none could be guessed.
        ArteError: pyarrow, which reads Parquet, is missing.
    """
    if isinstance(source, Path):
        name, source = source.name, open_table(source)
    picked = _pick(name, source.columns, columns)
    table = Table(name, [], picked, source.by_line, source.form)
    if "guessed" in source.form:
        table.notes.append(f"cells {source.form}")
    if picked not in (columns, ("input", "target")):
        table.notes.append(f"columns guessed by name: the input is '{picked[0]}', the answer '{picked[1]}'")
    names = [(label_names or {}).get(column) for column in picked]
    missing: dict[str, list[int]] = {"an input": [], "an answer": [], "anything": []}
    trimmed: list[int] = []
    spelling: dict[str, str] = {}  # one object for the many copies of a label
    at = [source.columns.index(column) for column in picked]
    last, pair = max(at), itemgetter(*at)
    for line, row in source.rows:
        if isinstance(row, list):
            first, second = (row[i] if i < len(row) else None for i in at) if len(row) <= last else pair(row)
        elif isinstance(row, Problem):
            table.bad.append(row)
            continue
        else:
            first, second = row.get(picked[0]), row.get(picked[1])
        text = first if type(first) is str else cell_text(first, names[0])
        target = second if type(second) is str and not names[1] else cell_text(second, names[1])
        if text is None or target is None:
            what = f"{first if text is None else second!r:.60} is not a text"
            table.bad.append(Problem(table.where(line), what))
        elif (bare := target.strip()) and text and not text.isspace():
            table.records.append((line, text, spelling.setdefault(bare, bare)))
            if len(bare) < len(target):
                trimmed.append(line)
        else:
            lacks = "an input" if bare else "an answer" if text.strip() else "anything"
            missing[lacks].append(line)
    table.n_rows = len(table.records) + len(table.bad) + sum(map(len, missing.values()))
    table.notes += noted("blanks around the answer left out in", trimmed, source.by_line)
    for what, lines in missing.items():
        table.notes += noted("dropped", lines, source.by_line, f"without {what} ")
    return table


def cell_text(cell: object, names: Sequence[str] | None = None) -> str | None:
    """Return `cell` as text, empty if it is missing, None if it is no text, number or the like."""
    if names and isinstance(cell, str | int) and str(cell).lstrip("-").isdecimal():
        return names[int(cell)] if 0 <= int(cell) < len(names) else ""  # -1: a row without label
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, dict):
        return json.dumps(_present(cell), ensure_ascii=False)
    return None if isinstance(cell, list | tuple | bytes) else str(cell)


def _present(value: object) -> object:
    """Return an object's parts without those that are missing, its numbers as numbers."""
    if isinstance(value, dict):
        return {key: _present(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_present(part) for part in value]
    return json.loads(value) if isinstance(value, _Number) else value


def _pick(name: str, columns: Sequence[str], given: Columns) -> tuple[str, str]:
    """Return the two columns: the `given` ones, else the only ones with usual names; ours go before other names."""
    hint = "Name two: --input COLUMN --target COLUMN, or ?input=…&target=…."
    chat = "Chat turns are not split: write a table with both columns. " if "messages" in columns else ""
    picked = [
        _column(name, role, [c for c in columns if c not in given], columns, column, usual, chat, hint)
        for role, column, usual in zip(("input", "answer"), given, _USUAL, strict=True)
    ]
    return picked[0], picked[1]


def input_column(name: str, columns: Sequence[str], given: str | None) -> str:
    """Return the column of inputs: the `given` one, the only one, else the only one with a usual name.

    Raises InputError: it is not there, or which it is is not clear.
    """
    if given is None and len(columns) == 1:
        return columns[0]
    return _column(name, "input", columns, columns, given, _USUAL[0], "", "Name it: --column COLUMN.")


def _column(
    name: str,
    role: str,
    free: Sequence[str],
    columns: Sequence[str],
    column: str | None,
    usual: Sequence[str],
    unclear: str,
    hint: str,
) -> str:
    """Return `column`, else the only one of `free` with a usual name; `unclear` and `hint` are for the error."""
    given = column
    if column is None:
        fits = [other for other in free if other.casefold() in usual]
        column = usual[0] if fits.count(usual[0]) == 1 else fits[0] if len(fits) == 1 else None
    if column is not None and columns.count(column) == 1:
        return column
    shown = ", ".join(other[:40] for other in columns[:20]) or "none"
    what = f"which column is the {role} is not clear" if column is None else f"no column '{column}'"
    what = f"several columns '{column}'" if columns.count(str(column)) > 1 else what
    first = f"{nearest(given, columns)} " if given else unclear
    raise InputError(f"{name}: {what}", f"{first}Its columns: {shown}. {hint}")

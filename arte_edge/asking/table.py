"""Questions from a table to a student: its rows with the answers in a column more, resumable.

Each answer goes at once into a journal beside the output, ``.NAME.answers.jsonl``, and the output appears whole at
the end. A command that was killed reads the journal and continues; a finished one finds everything in it. The journal
names the table, the student and the settings that its answers belong to, and no others are mixed with them.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arte_edge.asking.ask import QuestionTooLong, Student
from arte_edge.cache import atomic_file, disk_errors, locked, sha256_checkpoint, sha256_file
from arte_edge.console import Reporter
from arte_edge.errors import InputError, nearest
from arte_edge.files import json_loads
from arte_edge.models.artifact import checksums_of
from arte_edge.tasks.tables import cell_text, input_column, open_table
from arte_edge.tasks.task import Problem, raise_first

_JSON = (".jsonl", ".ndjson")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OURS = ("answer", "text")


@dataclass(frozen=True)
class AnsweredTable:
    """A finished table: how many of its rows have an answer, and why the others have none."""

    out: Path
    rows: int
    answered: int
    unanswered: int  # the text holds no answer in the task's form
    empty: int  # there was no question
    failed: int  # such as a question longer than the context
    new: int  # answers that were not in the journal
    seconds: float
    first_failure: str = ""

    def __str__(self) -> str:
        counts = {
            "without an answer in the task's form": self.unanswered,
            "with an empty cell": self.empty,
            "failed": self.failed,
        }
        more = "".join(f", {n:,} {what}" for what, n in counts.items() if n)
        first = f" ({self.first_failure})" if self.failed else ""
        return f"{self.out}: {self.rows:,} rows, {self.answered:,} answered{more}{first}; {self.new:,} of them now"


def journal_of(out: Path) -> Path:
    """Return where the answers of an output are kept."""
    return out.with_name(f".{out.name}.answers.jsonl")


def ask_table(
    student: Student,
    path: Path,
    out: Path,
    *,
    column: str | None = None,
    with_text: bool = False,
    reporter: Reporter | None = None,
) -> AnsweredTable:
    """Ask every row of the table `path` and write it with the answers to `out`; called again, it continues.

    Args:
        column: of the questions; found by its name unless given.
        with_text: add a column with the whole text of each answer.

    Raises InputError: no such table or column, an unreadable row, or `out` holds something else;
    ArteError: the model cannot be opened, its runtime failed, or the disk is full.
    """
    began = time.monotonic()
    if out.suffix.lower() not in (*_DELIMITERS, *_JSON):
        hint = f"{nearest(out.suffix, (*_DELIMITERS, *_JSON))} The name's ending says what is written."
        raise InputError(f"{out}: not a known kind of table", hint)
    columns, rows, questions, facts = _read(path, out, column)
    known = facts | {"student": _identity(student.path), "grammar": student.grammar}
    known |= {"max_tokens": student.max_tokens, "task": student.task.sha256 if student.task else ""}
    reporter = reporter or Reporter(quiet=True)
    with locked("ask", of=out):
        journal = _Journal(out, known)
        todo = list(dict.fromkeys(text for text in questions if text.strip() and text not in journal.replies))
        if todo:
            student.model  # noqa: B018 (opened here: its errors are not a row's)
        with journal, reporter.bar("answering", len(todo)) as step:
            for text in todo:
                reply = journal.add(_reply(student, text))
                step(1, reply.get("tokens", 0))
        answers = [journal.replies.get(text, {"answer": "", "text": ""}) for text in questions]
        _write(out, columns, rows, answers, with_text)
    return _counted(out, questions, answers, len(todo), time.monotonic() - began)


def _read(
    path: Path, out: Path, column: str | None
) -> tuple[list[str], list[dict[str, object] | list[str]], list[str], dict[str, Any]]:
    """Return the columns, the rows, the question of each, and what names them in a journal."""
    if out.exists() and path.exists() and out.samefile(path):
        raise InputError(f"{out}: the table itself", "Give another -o.")
    source = open_table(path, least=1, as_written=False)
    name = input_column(path.name, source.columns, column)
    at, width = source.columns.index(name), len(source.columns)
    rows: list[dict[str, object] | list[str]] = []
    questions: list[str] = []
    for line, row in source.rows:
        where = f"{path.name}:{line}" if source.by_line else f"{path.name}[{line}]"
        if isinstance(row, Problem):
            raise InputError(str(row), row.hint)
        if not row:
            continue  # a blank line
        cells = [*row, *[""] * (width - len(row))][:width] if isinstance(row, list) else dict(row)
        text = cell_text(cells[at] if isinstance(cells, list) else cells.get(name))
        raise_first([Problem(where, f"'{name}' is not a text")] if text is None else [], str(path))
        rows.append(cells)
        questions.append(text or "")
    named = {key: None for row in rows if isinstance(row, dict) for key in row}
    columns = list(named or source.columns)
    if len(columns) != len(set(columns)) and out.suffix.lower() in _JSON:
        raise InputError(f"{path.name}: two columns have the same name", "Rename one, or write a CSV.")
    return columns, rows, questions, {"table": sha256_file(path), "column": name}


def _identity(path: Path) -> str:
    if path.is_file():
        return sha256_file(path)
    return sha256_checkpoint(path) if any(path.glob("*.safetensors")) else checksums_of(path).sha256


def _reply(student: Student, text: str) -> dict[str, Any]:
    try:
        return asdict(student.ask(text))
    except QuestionTooLong as error:  # the others may fit
        return {"input": text, "answer": None, "text": "", "error": error.message}


class _Journal:
    """The answers that are there already, by question; new ones are on the disk when `add` returns."""

    def __init__(self, out: Path, known: Mapping[str, Any]) -> None:
        self.path = journal_of(out)
        self._known = {"version": 1, **known}
        self.replies: dict[str, dict[str, Any]] = {}
        content = self.path.read_bytes() if self.path.is_file() else b""
        self._whole = content.rfind(b"\n") + 1  # what follows was cut short by a kill
        lines = content[: self._whole].splitlines()
        if not lines:
            if out.exists():
                raise InputError(f"{out}: there already", "Give another -o, or remove it.")
            return
        try:
            head, *rows = map(json_loads, lines)
            self.replies = {row["input"]: row for row in rows}
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{self.path}: damaged ({error})", "Remove it to start again.") from error
        if differ := sorted(key for key, value in self._known.items() if head.get(key) != value):
            what = f"{out}: belongs to another command, with another {' and '.join(differ)}"
            raise InputError(what, f"Give another -o, or remove {out.name} and {self.path.name} to start again.")

    def __enter__(self) -> None:
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if self._whole else "wb")
            self._file.truncate(self._whole)
            self._file.seek(self._whole)
        if not self._whole:
            self._line(self._known)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        self._line(row)
        self.replies[row["input"]] = row
        return row

    def _line(self, row: Mapping[str, Any]) -> None:
        with disk_errors(self.path):
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._file.flush()


def _write(
    out: Path,
    columns: Sequence[str],
    rows: Iterable[Mapping[str, object] | list[str]],
    answers: Iterable[Mapping[str, Any]],
    with_text: bool,
) -> None:
    """Write the table with what was answered, in columns that no column of it has the name of."""
    ours = {key: key if key not in columns else f"student_{key}" for key in _OURS[: 1 + with_text]}
    with atomic_file(out) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        if out.suffix.lower() in _JSON:
            for row, reply in zip(rows, answers, strict=True):
                own = row if isinstance(row, Mapping) else dict(zip(columns, row, strict=True))
                found = {name: reply[key] for key, name in ours.items()}
                file.write(json.dumps({**own, **found}, ensure_ascii=False, default=str) + "\n")
            return
        form: dict[str, Any] = {"delimiter": _DELIMITERS[out.suffix.lower()], "lineterminator": "\n"}
        plain, quoted = csv.writer(file, **form), csv.writer(file, **form, quoting=csv.QUOTE_ALL)
        plain.writerow([*columns, *ours.values()])
        for row, reply in zip(rows, answers, strict=True):
            cells = row if isinstance(row, list) else [_cell(row.get(name)) for name in columns]
            cells = [*cells, *(reply[key] or "" for key in ours)]
            # A carriage return is left without quotes by itself, and ends the row for many readers.
            (quoted if any("\r" in cell for cell in cells) else plain).writerow(cells)


def _cell(value: object) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _counted(
    out: Path, questions: Sequence[str], answers: Sequence[Mapping[str, Any]], new: int, seconds: float
) -> AnsweredTable:
    failures = [reply["error"] for reply in answers if "error" in reply]
    empty = sum(not text.strip() for text in questions)
    unanswered = sum(reply["answer"] is None for reply in answers) - len(failures)
    return AnsweredTable(
        out,
        rows=len(questions),
        answered=len(questions) - empty - unanswered - len(failures),
        unanswered=unanswered,
        empty=empty,
        failed=len(failures),
        new=new,
        seconds=seconds,
        first_failure=failures[0] if failures else "",
    )

"""Prints the rows of a benchmark: a table or JSON on stdout, optionally a file, progress on stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from arte_edge.bench.report import Table, as_csv, as_json, quality_line, summary
from arte_edge.bench.settings import Reporter
from arte_edge.cache import megabytes, write_atomic
from arte_edge.console import err
from arte_edge.errors import InputError, nearest
from arte_edge.results.rows import QualityRow, SpeedRow, append_rows

__all__ = ["FORMATS", "Output"]

FORMATS = ("csv", "json", "jsonl", "md")


class Output(Reporter):
    """Receives rows and progress; finished rows are written also when the benchmark is stopped early."""

    def __init__(self, form: str, file: Path | None = None) -> None:
        """Check the formats.

        Raises:
            InputError: an unknown format, or a file whose ending says none.
        """
        if form not in FORMATS:
            raise InputError(f"-o {form}: no such format", nearest(form, FORMATS))
        self._file_form = "" if file is None else file.suffix.removeprefix(".")
        if file is not None and self._file_form not in FORMATS:
            raise InputError(f"--output-file {file}: what format?", "End it in .md, .csv, .json or .jsonl.")
        if file is not None and not file.absolute().parent.is_dir():
            raise InputError(f"--output-file {file}: there is no such folder")
        self._form, self._file = form, file
        self._rows: list[SpeedRow | QualityRow] = []
        self._table = Table()
        self._file_lines: list[str] = []
        self._status = err.status("") if err.is_terminal else None
        self._last = ""

    def __enter__(self) -> Output:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
        if not self._rows and kind is not None:
            return
        speeds = [row for row in self._rows if isinstance(row, SpeedRow)]
        self._lines([*self._table.end(), *summary(speeds)])
        if self._form == "csv":
            sys.stdout.write(as_csv(self._rows))
        elif self._form == "json":
            sys.stdout.write(as_json(self._rows))
        sys.stdout.flush()
        if self._file is None or self._file_form == "jsonl":
            return
        text = {
            "md": lambda: "\n".join(self._file_lines) + "\n",
            "csv": lambda: as_csv(self._rows),
            "json": lambda: as_json(self._rows),
        }[self._file_form]()
        write_atomic(self._file, text.encode())

    def row(self, row: SpeedRow | QualityRow) -> None:
        """Print a row, or hold it back where the format needs all of them."""
        self._rows.append(row)
        if isinstance(row, SpeedRow):
            self._lines(self._table.add(row))
        else:
            self._lines([*self._table.end(), quality_line(row)])
        if self._form == "jsonl":
            sys.stdout.write(row.model_dump_json() + "\n")
            sys.stdout.flush()
        if self._file is not None and self._file_form == "jsonl":
            append_rows(self._file, [row])

    def progress(self, text: str) -> None:
        """Show what is being done: in place on a terminal, one line a test elsewhere."""
        if self._status is not None:
            from rich.markup import escape

            self._status.update(escape(text))
            return
        label = text.rpartition(": ")[0]
        if label != self._last:
            self._last = label
            err.print(label, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line."""
        err.print(text, markup=False, soft_wrap=True)

    def transfer(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """Show a copy: its share on a terminal, one line a large file elsewhere."""
        if self._status is not None:
            self.progress(
                f"copying {name}, {done_bytes / max(1, total_bytes):.0%} of {megabytes(total_bytes)}"
            )
        elif total_bytes >= 1_000_000 and name != self._last:
            self._last = name
            self.note(f"copying {name}, {megabytes(total_bytes)}")

    def _lines(self, lines: list[str]) -> None:
        self._file_lines += lines
        if self._form == "md" and lines:
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()

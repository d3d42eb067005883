"""Output of a benchmark: tables like those of llama-bench, 80 columns wide, CSV, JSON, HTML, and progress.

There is one table per model, printed as its rows arrive, so the column widths are fixed; notes that do not fit
into a cell are below the table. At the end there is a summary with one line per model.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from arte_edge.bench.settings import Reporter
from arte_edge.cache import megabytes, write_atomic
from arte_edge.console import WIDTH, Step, cut, doing, err
from arte_edge.errors import InputError, nearest
from arte_edge.files import user_path
from arte_edge.results.rows import QualityRow, Row, SpeedRow, append_rows

FORMATS = ("csv", "json", "jsonl", "md")

_TITLES = ("test", "thr", "t/s", "TTFT ms", "ITL p50", "p95", "MiB", "°C")
_WIDTHS, _SIDES = (10, 3, 14, 7, 7, 5, 5, 4), "<>>>>>>>"
_MIB = 1 << 20
_CONTENDED = "contended, so cards and recommendations leave it out"
_STATUS = {"out-of-memory": "out of memory", "refused": "rejected"}  # others are shown as they are


class Table:
    """Turns rows into lines as they arrive; call `end` after the last."""

    def __init__(self) -> None:
        self._model: tuple[str, str, str] | None = None
        self._notes: list[str] = []

    def add(self, row: SpeedRow) -> list[str]:
        """Return the lines that this row adds."""
        lines: list[str] = []
        model = (row.model_filename, row.sha256, row.runtime if row.ok else "")
        if self._model is None or model[:2] != self._model[:2]:
            lines += self.end()
            lines += [*_heading(row), "", _row(_TITLES, _WIDTHS, _SIDES), _rule(_WIDTHS, _SIDES)]
        self._model = model
        lines.append(_row(_cells(row), _WIDTHS, _SIDES))
        self._notes += _notes(row)
        return lines

    def end(self) -> list[str]:
        """Return the notes below the current table, and start a new one."""
        lines = [*self._notes]
        if self._model is not None:
            lines = ["", *lines, ""] if lines else [""]
        self._notes, self._model = [], None
        return lines


def _heading(row: SpeedRow) -> list[str]:
    """Return the lines with the model and its runtime."""
    facts = [row.model_type, row.quantization if row.quantization not in row.model_filename else ""]
    if row.model_n_params:
        facts.append(f"{row.model_n_params / 1e6:.0f} M parameters")
    if row.model_size:
        facts.append(f"{row.model_size / _MIB:.1f} MiB")
    facts.append(row.runtime)
    if {row.type_k, row.type_v} - {"", "f16"}:
        facts.append(f"cache {row.type_k}/{row.type_v}")
    return [cut(row.model_filename), cut(", ".join(filter(None, facts)))]


def summary(rows: Sequence[SpeedRow]) -> list[str]:
    """Return a table with one line per model, threads and depth; empty for fewer than two models."""
    groups: dict[tuple[str, int, int], list[SpeedRow]] = {}
    for row in rows:
        groups.setdefault((row.model_filename, row.n_threads, row.n_depth), []).append(row)
    if len({name for name, _, _ in groups}) < 2:
        return []
    titles = ("model", "thr", "MiB", "pp t/s", "tg t/s", "TTFT ms", "p95")
    widths = (22, 3, 4, 8, 9, 7, 5)
    lines = [_row(titles, widths, "<>>>>>>"), _rule(widths, "<>>>>>>")]
    for (name, threads, _), group in groups.items():
        prefill = next((row for row in group if row.n_prompt and row.ok), None)
        decode = next((row for row in group if row.n_gen and row.ok), None)
        cells = (
            name if len(name) <= widths[0] else "…" + name[-widths[0] + 1 :],
            str(threads),
            f"{group[0].model_size / _MIB:.0f}",
            _number(prefill.median_ts) if prefill else "-",
            _number(decode.median_ts) if decode else "-",
            _number(prefill.ttft_ms) if prefill else "-",
            _number(decode.itl_p95_ms) if decode else "-",
        )
        lines.append(_row(cells, widths, "<>>>>>>"))
    return [*lines, ""]


def quality_line(row: QualityRow) -> str:
    """Return one file's accuracy in one or two lines."""
    if row.status != "ok":
        return textwrap.fill(f"{row.model_filename}: {row.task}: {row.status}: {row.reason}", WIDTH)
    share = row.right / max(row.n, 1)
    text = f"{row.model_filename}: {row.task} {row.split}: {row.right}/{row.n} correct, {share:.1%}"
    text += f" ({row.low:.1%} to {row.high:.1%})"
    if row.difference is not None and row.reference:
        text += f", {row.difference:+.1%} against {row.reference}"
        if row.difference_low is not None and row.difference_high is not None:
            text += f" ({row.difference_low:+.1%} to {row.difference_high:+.1%})"
    if row.answer_seconds_p50 is not None:
        text += f", an answer in {row.answer_seconds_p50:.2f} s on {row.n_threads} threads"
        text += f" ({_CONTENDED}: other work held the cores)" if row.contended else ""
    if (bound := row.with_grammar) is not None:
        text += f"; with grammar {bound.right}/{bound.n}, {bound.accuracy:.1%} ({bound.low:.1%} to {bound.high:.1%})"
        text += f", {bound.difference_points} points"
    if row.partial:
        text += "; partial: not all of the split"
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")


def as_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV with a header, lists as JSON in their cell, records as columns of their own."""
    documents = []
    for row in rows:
        document = row.model_dump(mode="json")
        for part in ("device", "with_grammar"):
            document |= {f"{part}_{name}": value for name, value in (document.pop(part, None) or {}).items()}
        documents.append({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in document.items()})
    names = list(dict.fromkeys(name for document in documents for name in document))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(documents)
    return out.getvalue()


def as_json(rows: Sequence[Row]) -> str:
    """Return rows as a JSON array, one row per line."""
    return "[\n" + ",\n".join(row.model_dump_json() for row in rows) + "\n]\n"


def as_html(rows: Sequence[Row]) -> str:
    """Return a short HTML table for notebooks."""
    head = ("model", "quantization", "runtime", "threads", "test", "result")
    lines = [f"<tr>{''.join(f'<th>{title}</th>' for title in head)}</tr>"]
    for row in rows:
        if isinstance(row, SpeedRow):
            test, result = row.test, f"{_number(row.avg_ts)} tokens/s"
        else:
            test, result = row.task, f"{row.right}/{row.n} ({row.low:.0%} to {row.high:.0%})"
            if row.with_grammar is not None:
                result += f"; with grammar {row.with_grammar.right}/{row.n}"
        result = result if row.status == "ok" else row.status
        cells = (row.model_filename, row.quantization, row.runtime, str(row.n_threads), test, result)
        lines.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _cells(row: SpeedRow) -> list[str]:
    if not row.ok:
        rate = _STATUS.get(row.status, row.status)
    elif len(row.samples_ts) > 1:
        rate = f"{_number(row.median_ts)} ± {_number(row.stddev_ts)}"
    else:
        rate = _number(row.median_ts)
    rate += "?" if row.contended else ""
    heat = "" if row.temperature_c_max is None else f"{row.temperature_c_max:.0f}"
    memory = "" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / _MIB:.0f}"
    return [
        row.test,
        str(row.n_threads),
        rate,
        _number(row.ttft_ms),
        _number(row.itl_p50_ms),
        _number(row.itl_p95_ms),
        memory,
        heat + ("!" if row.throttled else ""),
    ]


def _notes(row: SpeedRow) -> list[str]:
    """Return the notes on a row."""
    notes: list[str] = []
    if not row.ok:
        notes.append(row.reason)
    if row.throttled:
        notes.append(f"throttled: {row.throttle_reason}")
    if row.contended:
        notes.append(f"{_CONTENDED}: {row.contended_reason}")
    elif row.n_repeated:
        notes.append(f"other work held the cores at times: {row.n_repeated} repetitions were done again")
    if row.slowed and row.sustained_ts is not None and row.burst_ts is not None:
        rates = f"{_number(row.burst_ts)} t/s at the start, {_number(row.sustained_ts)} at the end"
        notes.append(f"slowed down: {rates}")
    if row.expected_ts is not None:
        word = "at most" if "upper bound" in row.expected_from else "expected"
        notes.append(f"{word} {_number(row.expected_ts)} t/s ({row.expected_from})")
    if row.energy_j is not None:
        per_token = row.energy_j / max(1, len(row.samples_ns) * (row.n_prompt or row.n_gen))
        notes.append(f"{per_token * 1e3:.3g} mJ per token ({row.energy_source})")
    if row.ok and row.cv > 0.1:
        notes.append(f"unsteady: repetitions vary by {row.cv:.0%}")
    return [
        line
        for text in notes
        for line in textwrap.wrap(f"{row.test}, {row.n_threads} thr: {text}", WIDTH, subsequent_indent="  ")
    ]


def _number(value: float | None) -> str:
    """Return a number with about four digits."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _row(cells: Sequence[str], widths: Sequence[int], sides: str) -> str:
    shown = [f"{cell:{side}{width}}" for cell, width, side in zip(cells, widths, sides, strict=True)]
    return "| " + " | ".join(shown) + " |"


def _rule(widths: Sequence[int], sides: str) -> str:
    cells = ["-" * w if side == "<" else "-" * (w - 1) + ":" for w, side in zip(widths, sides, strict=True)]
    return _row(cells, widths, sides)


class Output(Reporter):
    """Prints rows on stdout and progress on stderr; finished rows are kept if the benchmark is stopped early.

    Raises InputError: an unknown format, or a file without a known suffix.
    """

    def __init__(self, form: str, file: Path | None = None) -> None:
        file = None if file is None else user_path(file)
        if form not in FORMATS:
            raise InputError(f"-o {form}: no such format", nearest(form, FORMATS))
        self._file_form = "" if file is None else file.suffix.removeprefix(".")
        if file is not None and self._file_form not in FORMATS:
            raise InputError(f"--output-file {file}: unknown format", "End it in .md, .csv, .json or .jsonl.")
        if file is not None and not file.absolute().parent.is_dir():
            raise InputError(f"--output-file {file}: there is no such folder")
        self._form, self._file = form, file
        self._rows: list[Row] = []
        self._table = Table()
        self._file_lines: list[str] = []
        self._doing = doing("starting", shown=True)
        self._step = Step("")
        self._last = ""

    def __enter__(self) -> Output:
        self._step = self._doing.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._doing.__exit__(None, None, None)
        if not self._rows and kind is not None:
            return
        speeds = [row for row in self._rows if isinstance(row, SpeedRow)]
        self._lines([*self._table.end(), *summary(speeds)])
        whole: dict[str, Callable[[Sequence[Row]], str]] = {"csv": as_csv, "json": as_json}
        if write := whole.get(self._form):
            sys.stdout.write(write(self._rows))
        sys.stdout.flush()
        if self._file is not None and self._file_form != "jsonl":
            write = whole.get(self._file_form)
            text = write(self._rows) if write else "\n".join(self._file_lines) + "\n"
            write_atomic(self._file, text.encode())

    def row(self, row: Row) -> None:
        """Print a row, unless the format needs all of them at once."""
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
        """Show the activity: in place on a terminal, one line per test elsewhere."""
        label, self._step.what = text.rpartition(": ")[0], text
        if label != self._last and not err.is_terminal:
            self._last = label
            err.print(label, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line."""
        err.print(text, soft_wrap=True)

    def transfer(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """Show an upload: its share on a terminal, one line per large file elsewhere."""
        share = done_bytes / max(1, total_bytes)
        self._step.what = f"copying {name}, {share:.0%} of {megabytes(total_bytes)}"
        if total_bytes >= 1_000_000 and name != self._last and not err.is_terminal:
            self._last = name
            self.note(f"copying {name}, {megabytes(total_bytes)}")

    def _lines(self, lines: list[str]) -> None:
        self._file_lines += lines
        if self._form == "md" and lines:
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()

"""Rows for people: the markdown table of llama-bench, with ours beside it, 80 columns wide.

A table a model, printed as its rows arrive, so every column has its width from the beginning; what does
not go into a cell stands below the table. At the end, for several models, a line each.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Sequence
from html import escape

from arte_edge.results.rows import QualityRow, SpeedRow

__all__ = ["Table", "as_csv", "as_html", "as_json", "heading", "quality_line", "summary"]

_WIDTH = 80
_COLUMNS = (
    ("test", 10, "<"),
    ("thr", 3, ">"),
    ("t/s", 14, ">"),
    ("TTFT ms", 7, ">"),
    ("ITL p50", 7, ">"),
    ("p95", 5, ">"),
    ("MiB", 5, ">"),
    ("°C", 4, ">"),
)
_WIDTHS = [width for _, width, _ in _COLUMNS]
_SIDES = "".join(side for _, _, side in _COLUMNS)
_MIB = 1 << 20
_WORDS = {
    "crashed": "crashed",
    "out-of-memory": "out of memory",
    "timeout": "too long",
    "refused": "refused",
}


class Table:
    """Turns rows into lines as they come; call `end` after the last."""

    def __init__(self) -> None:
        self._model: tuple[str, str, str] | None = None
        self._notes: list[str] = []

    def add(self, row: SpeedRow) -> list[str]:
        """Return the lines that this row adds."""
        lines: list[str] = []
        model = (row.model_filename, row.sha256, row.runtime if row.ok else "")
        if self._model is None or model[:2] != self._model[:2]:
            lines += self.end()
            lines += [*heading(row), "", _line([name for name, _, _ in _COLUMNS]), _rule(_WIDTHS, _SIDES)]
        self._model = model
        lines.append(_line(_cells(row)))
        self._notes += _notes(row)
        return lines

    def end(self) -> list[str]:
        """Return what stands below the table that was begun, and forget it."""
        lines = [*self._notes]
        if self._model is not None:
            lines = ["", *lines, ""] if lines else [""]
        self._notes, self._model = [], None
        return lines


def heading(row: SpeedRow) -> list[str]:
    """Return one or two lines that say which model this is, and what runs it."""
    facts = [row.model_type, row.quantization if row.quantization not in row.model_filename else ""]
    if row.model_n_params:
        facts.append(f"{row.model_n_params / 1e6:.0f} M parameters")
    if row.model_size:
        facts.append(f"{row.model_size / _MIB:.1f} MiB")
    facts.append(row.runtime)
    if {row.type_k, row.type_v} - {"", "f16"}:
        facts.append(f"cache {row.type_k}/{row.type_v}")
    return [_cut(row.model_filename), _cut(", ".join(filter(None, facts)))]


def summary(rows: Sequence[SpeedRow]) -> list[str]:
    """Return a table with a line for each model, threads and depth; empty for fewer than two models."""
    groups: dict[tuple[str, int, int], list[SpeedRow]] = {}
    for row in rows:
        groups.setdefault((row.model_filename, row.n_threads, row.n_depth), []).append(row)
    if len({name for name, _, _ in groups}) < 2:
        return []
    titles = ("model", "thr", "MiB", "read t/s", "write t/s", "TTFT ms", "p95")
    widths = (22, 3, 4, 8, 9, 7, 5)
    lines = [_row(titles, widths, "<>>>>>>"), _rule(widths, "<>>>>>>")]
    for (name, threads, _), group in groups.items():
        reads = [row for row in group if row.n_prompt and row.ok]
        writes = [row for row in group if row.n_gen and row.ok]
        cells = (
            name if len(name) <= widths[0] else "…" + name[-widths[0] + 1 :],
            str(threads),
            f"{group[0].model_size / _MIB:.0f}",
            _number(reads[0].median_ts) if reads else "-",
            _number(writes[0].median_ts) if writes else "-",
            _number(reads[0].ttft_ms) if reads else "-",
            _number(writes[0].itl_p95_ms) if writes else "-",
        )
        lines.append(_row(cells, widths, "<>>>>>>"))
    return [*lines, ""]


def quality_line(row: QualityRow) -> str:
    """Return one file's right answers in a line or two."""
    if row.status != "ok":
        return textwrap.fill(f"{row.model_filename}: {row.task}: {row.status}: {row.reason}", _WIDTH)
    share = row.right / max(row.n, 1)
    text = f"{row.model_filename}: {row.task} {row.split}: {row.right}/{row.n} right, {share:.1%}"
    text += f" ({row.low:.1%} to {row.high:.1%})"
    if row.difference is not None and row.reference:
        text += f", {row.difference:+.1%} against {row.reference}"
        if row.difference_low is not None and row.difference_high is not None:
            text += f" ({row.difference_low:+.1%} to {row.difference_high:+.1%})"
    if row.answer_seconds_p50 is not None:
        text += f", an answer in {row.answer_seconds_p50:.2f} s"
    if row.partial:
        text += "; partial: not all of the split"
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ")


def as_csv(rows: Sequence[SpeedRow | QualityRow]) -> str:
    """Return rows as CSV with a header, lists as JSON in their cell, the device's facts flat."""
    documents = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for document in documents for name in document))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(documents)
    return out.getvalue()


def as_json(rows: Sequence[SpeedRow | QualityRow]) -> str:
    """Return rows as a JSON array, a row a line."""
    return "[\n" + ",\n".join(row.model_dump_json() for row in rows) + "\n]\n"


def as_html(rows: Sequence[SpeedRow | QualityRow]) -> str:
    """Return a short HTML table for notebooks."""
    head = ("model", "quantization", "runtime", "threads", "test", "result")
    lines = [f"<tr>{''.join(f'<th>{title}</th>' for title in head)}</tr>"]
    for row in rows:
        if isinstance(row, SpeedRow):
            test, result = row.test, f"{_number(row.avg_ts)} tokens/s"
        else:
            test, result = row.task, f"{row.right}/{row.n} ({row.low:.0%} to {row.high:.0%})"
        result = result if row.status == "ok" else row.status
        cells = (row.model_filename, row.quantization, row.runtime, str(row.n_threads), test, result)
        lines.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _flat(row: SpeedRow | QualityRow) -> dict[str, object]:
    document = row.model_dump(mode="json")
    device = document.pop("device")
    document |= {f"device_{name}": value for name, value in device.items()}
    return {
        name: json.dumps(value) if isinstance(value, list | dict) else value
        for name, value in document.items()
    }


def _cells(row: SpeedRow) -> list[str]:
    if not row.ok:
        rate = _WORDS[row.status]
    elif len(row.samples_ts) > 1:
        rate = f"{_number(row.median_ts)} ± {_number(row.stddev_ts)}"
    else:
        rate = _number(row.median_ts)
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
    """Return what a cell is too small for."""
    said: list[str] = []
    if not row.ok:
        said.append(row.reason)
    if row.throttled:
        said.append(f"throttled: {row.throttle_reason}")
    if row.slowed and row.sustained_ts is not None and row.burst_ts is not None:
        said.append(f"slowed down: {_number(row.burst_ts)} t/s at first, {_number(row.sustained_ts)} at last")
    if row.expected_ts is not None:
        word = "at most" if "upper bound" in row.expected_from else "expected"
        said.append(f"{word} {_number(row.expected_ts)} t/s ({row.expected_from})")
    if row.energy_j is not None:
        per_token = row.energy_j / max(1, len(row.samples_ns) * (row.n_prompt or row.n_gen))
        said.append(f"{per_token * 1e3:.3g} mJ a token ({row.energy_source})")
    if row.ok and row.cv > 0.1:
        said.append(f"unsteady: its repetitions vary by {row.cv:.0%}")
    return [
        line
        for text in said
        for line in textwrap.wrap(f"{row.test}, {row.n_threads} thr: {text}", _WIDTH, subsequent_indent="  ")
    ]


def _number(value: float | None) -> str:
    """Return a number with about four digits."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return _row(cells, _WIDTHS, _SIDES)


def _row(cells: Sequence[str], widths: Sequence[int], sides: str) -> str:
    shown = [f"{cell:{side}{width}}" for cell, width, side in zip(cells, widths, sides, strict=True)]
    return "| " + " | ".join(shown) + " |"


def _rule(widths: Sequence[int], sides: str) -> str:
    cells = ["-" * w if side == "<" else "-" * (w - 1) + ":" for w, side in zip(widths, sides, strict=True)]
    return _row(cells, widths, sides)


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"

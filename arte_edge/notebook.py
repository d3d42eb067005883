"""Tables and notes as HTML for notebooks, made from the same tables that the terminal shows.

Every object that the Python API returns has a `_repr_html_` built here, so that a table is defined
once. Colours come from the notebook: the HTML sets only spacing, alignment and weight, and looks
right on light and dark backgrounds. Everything is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from rich.table import Column, Table
from rich.text import Text


class ResultTable(Table):
    """A table of the terminal that a notebook shows as an HTML table instead of as text."""

    def _repr_mimebundle_(
        self, include: Sequence[str], exclude: Sequence[str], **kwargs: Any
    ) -> dict[str, str]:
        bundle = super()._repr_mimebundle_(include, exclude, **kwargs)
        return {**bundle, "text/html": table_html(self)}


def fragment(title: str, tables: Iterable[Table] = (), lines: Sequence[str] = ()) -> str:
    """Return a title, tables, and lines of text below them, as one HTML fragment."""
    parts = ["<div>"]
    if title:
        parts.append(f"<p style='margin:0 0 0.4em'><b>{escape(title)}</b></p>")
    parts += [table_html(table) for table in tables]
    parts += [f"<p style='margin:0.4em 0 0'>{escape(line)}</p>" for line in lines if line.strip()]
    return "".join([*parts, "</div>"])


def table_html(table: Table) -> str:
    """Return a table of the terminal as an HTML table: its header, cells, alignment and bold rows."""
    columns = [(column, [_text(cell) for cell in column.cells]) for column in table.columns]
    head = "".join(
        f"<th style='{_style(column)};white-space:nowrap;font-weight:600'>{_text(column.header)}</th>"
        for column, _ in columns
    )
    body = ""
    for i, row in enumerate(table.rows):
        weight = "font-weight:600" if "bold" in str(row.style or "") else ""
        cells = "".join(
            f"<td style='{_style(column)};white-space:{'nowrap' if column.no_wrap else 'normal'}'>{texts[i]}</td>"
            for column, texts in columns
        )
        body += f"<tr style='background:none;{weight}'>{cells}</tr>"
    side = "caption-side:bottom;text-align:left;padding-top:0.3em"
    caption = f"<caption style='{side}'>{_text(table.caption)}</caption>" if table.caption else ""
    return (
        f"<table style='border-collapse:collapse;margin:0'>{caption}"
        f"<thead><tr style='border-bottom:1px solid currentColor'>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _text(cell: object) -> str:
    """Return the escaped text of a cell."""
    return escape(cell.plain if isinstance(cell, Text) else str(cell))


def _style(column: Column) -> str:
    align = column.justify if column.justify in ("left", "right", "center") else "left"
    return f"padding:0.2em 0.8em 0.2em 0;text-align:{align};border:none"

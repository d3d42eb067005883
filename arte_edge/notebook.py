"""Tables and notes as HTML for notebooks, made from the same tables that the terminal shows.

Every object that the Python API returns has a `_repr_html_` built here, so that a table is defined
once. Colours come from the notebook: the HTML sets only spacing, alignment and weight, and looks
right on light and dark backgrounds. Everything is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from rich.table import Table

__all__ = ["ResultTable", "fragment", "table_html"]

_CELL = "padding:0.2em 0.8em 0.2em 0;text-align:{align};white-space:{wrap};border:none"


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
    columns = table.columns
    cells = [[_plain(cell) for cell in column.cells] for column in columns]
    head = "".join(
        f"<th style='{_style(column.justify, wrap=False)};font-weight:600'>{escape(_plain(column.header))}</th>"
        for column in columns
    )
    body = []
    for index, row in enumerate(table.rows):
        weight = "font-weight:600" if "bold" in str(row.style or "") else ""
        body.append(
            f"<tr style='background:none;{weight}'>"
            + "".join(
                f"<td style='{_style(column.justify, wrap=not column.no_wrap)}'>{escape(text[index])}</td>"
                for column, text in zip(columns, cells, strict=True)
            )
            + "</tr>"
        )
    caption = ""
    if table.caption:
        side = "caption-side:bottom;text-align:left;padding-top:0.3em"
        caption = f"<caption style='{side}'>{escape(_plain(table.caption))}</caption>"
    return (
        f"<table style='border-collapse:collapse;margin:0'>{caption}"
        f"<thead><tr style='border-bottom:1px solid currentColor'>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _plain(cell: object) -> str:
    """Return the text of a cell without its markup."""
    from rich.text import Text

    if isinstance(cell, Text):
        return cell.plain
    return Text.from_markup(str(cell)).plain


def _style(justify: str, *, wrap: bool) -> str:
    align = justify if justify in ("left", "right", "center") else "left"
    return _CELL.format(align=align, wrap="normal" if wrap else "nowrap")

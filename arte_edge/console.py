"""Output: data on stdout, everything else on stderr, JSON on request, progress of long work.

A terminal shows the current step all the time, a pipe or log gets a line after `SILENCE_S` without one. `Reporter`
also records events in ``events.jsonl``. Text is printed as it is: brackets in a path are no markup.

Every object that the Python API returns has a `_repr_html_` made by `fragment` from the table that the terminal shows,
so that a table is defined once. Colours come from the notebook: the HTML sets only spacing, alignment and weight, and
looks right on light and dark backgrounds. Everything in it is escaped.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

# (step, bytes done, total bytes; 0: unknown)
ByteProgress = Callable[[str, int, int], None]

SILENCE_S = 25.0  # at most 30 s are promised


class _Stderr(Console):
    """The console of progress; `printed_s` is when it last printed, on the monotonic clock."""

    printed_s = 0.0

    def print(self, *objects: Any, **options: Any) -> None:
        self.printed_s = time.monotonic()
        super().print(*objects, **options)


_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
# Tables wrap in a pipe as in an 80-column terminal.
out = Console(**_PLAIN, soft_wrap=False)
err = _Stderr(**_PLAIN, stderr=True)


def tolerate_any_encoding() -> None:
    """Replace what stdout and stderr cannot encode: an ASCII locale must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def emit_json(value: Any) -> None:
    """Write one JSON document on one line of stdout, in ASCII where stdout cannot encode the text."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, default=str)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclass
class Step:
    """Something that is being done. `total` is 0 if it is not known; both counts are in `unit`."""

    what: str
    total: int = 0
    unit: str = ""
    done: int = 0
    note: str = ""
    began_s: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        seconds = time.monotonic() - self.began_s
        text = f"{self.what}: "
        if self.total:
            text += f"{self.done} of {self.total}{self.unit}{self.note}, "
            if 0 < self.done < self.total:
                text += f"about {_clock(seconds / self.done * (self.total - self.done))} left, "
        return f"{text}{_clock(seconds)} so far"

    def __rich__(self) -> Text:
        return Text(str(self))


_steps: list[Step] = []  # from the outermost in


@contextmanager
def doing(what: str, total: int = 0, unit: str = "", *, shown: bool = False) -> Iterator[Step]:
    """Name a step for `heartbeat` while the block runs; `shown`: on a terminal it is seen all the time."""
    step = Step(what, total, unit)
    _steps.append(step)
    try:
        with err.status(step) if shown and err.is_terminal else nullcontext():
            yield step
    finally:
        _steps.remove(step)


@contextmanager
def heartbeat(verb: str) -> Iterator[None]:
    """Print the current step on stderr whenever it was silent for `SILENCE_S`; not on a terminal."""
    over, err.printed_s = threading.Event(), time.monotonic()

    def beat() -> None:
        while not over.wait(max(err.printed_s + SILENCE_S - time.monotonic(), 0.05)):
            if time.monotonic() - err.printed_s >= SILENCE_S and (steps := list(_steps)):
                err.print(": ".join([*(step.what for step in steps[:-1]), str(steps[-1])]), soft_wrap=True)

    with doing(verb):
        if not err.is_terminal:
            threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            over.set()


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Reporter:
    """Reports stages and their calls. With `as_json` events go to stdout, one JSON object a line."""

    def __init__(self, events: Path | None = None, *, as_json: bool = False, quiet: bool = False) -> None:
        self._events = events
        self._as_json = as_json
        self._quiet = quiet or as_json
        self._began = time.monotonic()

    @property
    def quiet(self) -> bool:
        """True if there is no output for people."""
        return self._quiet

    def event(self, kind: str, **fields: Any) -> None:
        """Record one event; `t_s` is seconds since the run began."""
        row = {"event": kind, "t_s": round(time.monotonic() - self._began, 2), **fields}
        if self._events is not None:
            with self._events.open("a", encoding="utf-8", errors="surrogatepass") as file:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        if self._as_json:
            emit_json(row)

    def say(self, text: RenderableType, head: str = "", style: str = "bold") -> None:
        """Print something for people; `head` stands before it in `style`."""
        if not self._quiet:
            err.print(Text.assemble((head, style), str(text)) if head else text)

    def warn(self, text: str) -> None:
        self.event("warning", text=text)
        self.say(f" {text}", "warning:", "bold yellow")

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[], float]]:
        """Record begin, end and time of a stage, also if it fails; yields a clock in seconds."""
        self.event("stage", name=name, state="begin")
        began = time.monotonic()
        state = "failed"
        try:
            with doing(name):
                yield lambda: time.monotonic() - began
            state = "done"
        finally:
            self.event("stage", name=name, state=state, seconds=round(time.monotonic() - began, 2))

    def done(self, name: str, text: str, seconds: float | None) -> None:
        """Print the result of a stage; `seconds` is None if it was cached."""
        from rich.table import Table

        clock = "cached" if seconds is None else f"{seconds:.0f} s"
        line = Table.grid(padding=(0, 1, 0, 0))  # a long text wraps inside its own column
        line.add_column()
        line.add_column(min_width=9)
        line.add_column()
        line.add_row(Text("✓", "green"), Text(name, "bold"), Text.assemble(text, (f" ({clock})", "dim")))
        self.say(line)

    @contextmanager
    def bar(self, what: str, total: int, unit: str = "") -> Iterator[Any]:
        """Show the progress of `total` calls; yields ``step(n, tokens, cached)``."""
        tokens, cached = 0, 0
        with doing(what, total, unit, shown=not self._quiet) as current:

            def step(n: int, new_tokens: int = 0, new_cached: int = 0) -> None:
                nonlocal tokens, cached
                tokens, cached = tokens + new_tokens, cached + new_cached
                rate = tokens / max(time.monotonic() - current.began_s, 1e-6)
                current.done += n
                current.note = f", {rate:.0f} tokens/s" * bool(tokens) + f", {cached} cached" * bool(cached)

            yield step
        self.event("calls", what=what, n=total, tokens=tokens, kept=cached)

    @contextmanager
    def percent(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Show a training's progress; yields ``progress(done, total)`` in steps."""
        with doing(what, 100, " %", shown=not self._quiet) as current:

            def progress(done: int, total: int) -> None:
                current.done = 100 * done // max(total, 1)

            yield progress


@contextmanager
def step_progress(name: str = "", unit: str = "", per_unit: int = 1) -> Iterator[ByteProgress]:
    """Yield a callback (step, done, total): in place on a terminal, one line a step elsewhere."""
    with doing(name, unit=unit, shown=True) as current:

        def progress(step: str, done: int, total: int) -> None:
            what = f"{name}: {step}" if name else step
            if what != current.what:
                current.what, current.began_s = what, time.monotonic()
                if not err.is_terminal:
                    err.print(what, soft_wrap=True)
            current.done, current.total = done // per_unit, total // per_unit if total > 1 else 0

        yield progress


def model_progress(name: str) -> AbstractContextManager[ByteProgress]:
    """Return the progress callback of `models.resolve` as a context manager."""
    return step_progress(name, " MB", 1_000_000)


WIDTH = 80  # of text that is printed as it is


def cut(text: str) -> str:
    """Return `text` short enough for a line."""
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


class ResultTable(Table):
    """A table of the terminal that a notebook shows as an HTML table instead of as text."""

    def _repr_mimebundle_(self, include: Sequence[str], exclude: Sequence[str], **kwargs: Any) -> dict[str, str]:
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

"""Output: data on stdout, everything else on stderr, JSON on request, progress of long work.

A terminal gets progress bars, a pipe or log gets lines. `Reporter` also records events in ``events.jsonl``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

__all__ = ["ByteProgress", "Reporter", "emit_json", "err", "model_progress", "out", "transfer_bar"]

# Tables wrap in a pipe as in an 80-column terminal.
out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)

# (step, bytes done, total bytes; 0: unknown)
ByteProgress = Callable[[str, int, int], None]

_WORTH_A_LINE_BYTES = 1_000_000


def emit_json(value: Any) -> None:
    """Write one JSON document on one line of stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


class Reporter:
    """Reports stages and their calls. With `as_json` events go to stdout, one JSON object a line."""

    def __init__(self, events: Path | None = None, *, as_json: bool = False, quiet: bool = False) -> None:
        self._events = events
        self._as_json = as_json
        self._quiet = quiet or as_json
        self._bar: Bars | None = None
        self._began = time.monotonic()

    @property
    def quiet(self) -> bool:
        """True if there is no output for people."""
        return self._quiet

    def event(self, kind: str, **fields: Any) -> None:
        """Record one event; `t_s` is seconds since the run began."""
        row = {"event": kind, "t_s": round(time.monotonic() - self._began, 2), **fields}
        if self._events is not None:
            with self._events.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        if self._as_json:
            emit_json(row)

    def say(self, text: RenderableType) -> None:
        """Print something for people."""
        if not self._quiet:
            (self._bar.console if self._bar else err).print(text)

    def warn(self, text: str) -> None:
        self.event("warning", text=text)
        self.say(f"[bold yellow]warning:[/] {text}")

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[], float]]:
        """Record begin, end and time of a stage, also if it fails; yields a clock in seconds."""
        self.event("stage", name=name, state="begin")
        began = time.monotonic()
        state = "failed"
        try:
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
        line.add_row("[green]✓[/]", f"[bold]{name}[/]", f"{escape(text)} [dim]({clock})[/]")
        self.say(line)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Any]:
        """Show a progress bar for `total` calls; yields ``step(n, tokens, cached)``."""
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

        tokens, cached = 0, 0
        began = time.monotonic()
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=err,
            transient=True,
            disable=self._quiet or not err.is_terminal,
        )
        with bar:
            self._bar = bar
            task = bar.add_task(what, total=total, note="")

            def step(n: int, new_tokens: int = 0, new_cached: int = 0) -> None:
                nonlocal tokens, cached
                tokens += new_tokens
                cached += new_cached
                rate = tokens / max(time.monotonic() - began, 1e-6)
                note = f"{rate:.0f} tokens/s" + (f", {cached} cached" if cached else "")
                bar.update(task, advance=n, note=note)

            try:
                yield step
            finally:
                self._bar = None
        self.event("calls", what=what, n=total, tokens=tokens, kept=cached)

    @contextmanager
    def percent(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Show a training's progress; yields ``progress(done, total)`` in steps."""
        with self.bar(what, 100) as step:
            shown = 0

            def progress(done: int, total: int) -> None:
                nonlocal shown
                now = 100 * done // max(total, 1)
                step(now - shown)
                shown = now

            yield progress


@contextmanager
def model_progress(name: str) -> Iterator[ByteProgress]:
    """Yield the progress callback of `models.resolve`: a bar on a terminal, one line a step elsewhere."""
    if not err.is_terminal:
        last = ""

        def line(step: str, done_bytes: int, total_bytes: int) -> None:
            nonlocal last
            if step != last:
                last = step
                err.print(f"{name}: {step}", markup=False)

        yield line
        return
    with _byte_bar() as bars:
        task = bars.add_task("", total=None)

        def report(step: str, done_bytes: int, total_bytes: int) -> None:
            bars.update(task, description=step, completed=done_bytes, total=total_bytes or None)

        yield report


@contextmanager
def transfer_bar(say: Callable[[str], None]) -> Iterator[ByteProgress]:
    """Yield the progress callback of an upload: a bar on a terminal, one line a large file elsewhere."""
    if not err.is_terminal:
        named: set[str] = set()

        def line(name: str, done_bytes: int, total_bytes: int) -> None:
            if name not in named and total_bytes >= _WORTH_A_LINE_BYTES:
                named.add(name)
                say(f"copying {name}, {total_bytes / 1e6:.0f} MB")

        yield line
        return
    with _byte_bar() as bars:
        task = bars.add_task("", total=None, visible=False)

        def move(name: str, done_bytes: int, total_bytes: int) -> None:
            shown = escape(name if len(name) <= 28 else f"…{name[-27:]}")
            visible = done_bytes < total_bytes
            bars.update(task, description=shown, completed=done_bytes, total=total_bytes, visible=visible)

        yield move


def _byte_bar() -> Bars:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err, transient=True)

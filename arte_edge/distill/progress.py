"""What a run says while it works: one line a stage on stderr, or JSON events on stdout.

Every event also goes to ``events.jsonl`` in the run folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from arte_edge.cli.console import emit_json, err

__all__ = ["Reporter"]


class Reporter:
    """Reports stages and the calls in them. With `as_json` events go to stdout, one object a line."""

    def __init__(self, events: Path | None = None, *, as_json: bool = False, quiet: bool = False) -> None:
        self._events = events
        self._as_json = as_json
        self._quiet = quiet or as_json
        self._bar: Progress | None = None
        self._began = time.monotonic()

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
        """Bracket a stage; yields a clock in seconds. Its time is recorded also when it fails."""
        self.event("stage", name=name, state="begin")
        began = time.monotonic()
        state = "failed"
        try:
            yield lambda: time.monotonic() - began
            state = "done"
        finally:
            self.event("stage", name=name, state=state, seconds=round(time.monotonic() - began, 2))

    def done(self, name: str, text: str, seconds: float | None) -> None:
        """Print the closing line of a stage; `seconds` is None if it was kept from an earlier start."""
        clock = "kept" if seconds is None else f"{seconds:.0f} s"
        line = Table.grid(padding=(0, 1, 0, 0))  # what does not fit goes on under its own column
        line.add_column()
        line.add_column(min_width=9)
        line.add_column()
        line.add_row("[green]✓[/]", f"[bold]{name}[/]", f"{escape(text)} [dim]({clock})[/]")
        self.say(line)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Any]:
        """Show a progress bar for `total` calls; yields ``step(n, tokens, cached)``."""
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
                note = f"{rate:.0f} tokens/s" + (f", {cached} kept" if cached else "")
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

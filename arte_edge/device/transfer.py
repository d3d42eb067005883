"""How far a copy is: a bar on a terminal, one line a large file elsewhere. Everything goes to stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from arte_edge.device.copy import Tick
from arte_edge.models.disk import megabytes

__all__ = ["transfer_bar"]

_WORTH_A_LINE_BYTES = 1_000_000


@contextmanager
def transfer_bar(say: Callable[[str], None]) -> Iterator[Tick]:
    """Yield the callback for `arte_edge.device.copy.send`."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        told: set[str] = set()

        def line(name: str, done_bytes: int, total_bytes: int) -> None:
            if name not in told and total_bytes >= _WORTH_A_LINE_BYTES:
                told.add(name)
                say(f"copying {name}, {megabytes(total_bytes)}")

        yield line
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("", total=None, visible=False)

        def move(name: str, done_bytes: int, total_bytes: int) -> None:
            shown = escape(name if len(name) <= 28 else f"…{name[-27:]}")
            done = done_bytes >= total_bytes
            bars.update(bar, description=shown, completed=done_bytes, total=total_bytes, visible=not done)

        yield move

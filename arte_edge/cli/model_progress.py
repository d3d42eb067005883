"""Show how far a model is fetched or converted: a bar on a terminal, one line a step elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from arte_edge.cache import Progress
from arte_edge.console import err

__all__ = ["model_progress"]


@contextmanager
def model_progress(name: str) -> Iterator[Progress]:
    """Yield the callback to hand to `arte_edge.models.resolve`; everything goes to stderr."""
    if not err.is_terminal:
        said = ""

        def line(step: str, done_bytes: int, total_bytes: int) -> None:
            nonlocal said
            if step != said:
                said = step
                err.print(f"{name}: {step}", markup=False)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=err, transient=True) as bars:
        task = bars.add_task("", total=None)

        def report(step: str, done_bytes: int, total_bytes: int) -> None:
            bars.update(task, description=step, completed=done_bytes, total=total_bytes or None)

        yield report

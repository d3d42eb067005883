"""``arte-edge ask``: one question to a run's tuned student."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from arte_edge.console import emit_json, err, out

__all__ = ["ask"]


def ask(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name under runs/.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="An input of the run's task.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 96,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask a run's student one question of its task.

    The answer is printed on stdout, the whole text and its time on stderr.
    """
    from arte_edge import api

    reply = api.ask(run, text, max_tokens=max_tokens)
    if as_json:
        emit_json(asdict(reply))
        return
    err.print(reply.text.strip(), style="dim", soft_wrap=True)
    err.print(f"{reply.completion_tokens} tokens in {reply.seconds:.1f} s", style="dim")
    out.print("(no answer in the task's form)" if reply.answer is None else reply.answer)

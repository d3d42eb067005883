"""``arte-edge env``: what a bug report needs to know about this installation."""

from __future__ import annotations

from typing import Annotated

import typer

from arte_edge.console import emit_json, out

__all__ = ["env"]


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions and hardware for a bug report.

    The output contains nothing private.
    """
    from arte_edge.environment import environment

    found = environment()
    if as_json:
        emit_json(found.as_dict())
    else:
        out.print("\n".join(found.lines()), soft_wrap=True)

"""Where words go: data to stdout, everything else to stderr, JSON when asked for."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

__all__ = ["emit_json", "err", "out"]

# Tables must not wrap differently in a pipe than in an 80-column terminal.
out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


def emit_json(value: Any) -> None:
    """Write one JSON document on one line of stdout, the form that ``--json`` promises."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()

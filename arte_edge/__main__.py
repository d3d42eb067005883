"""The ``arte-edge`` command, also as ``python -m arte_edge``."""

from __future__ import annotations

import sys

from arte_edge.cli import interrupt


def run() -> int:
    """Run the command line and return its exit code; signals are handled before all verbs are imported."""
    interrupt.install()
    try:
        from arte_edge.cli.main import main

        return main()
    except KeyboardInterrupt:
        interrupt.end()


if __name__ == "__main__":
    sys.exit(run())

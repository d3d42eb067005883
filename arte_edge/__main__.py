"""``python -m arte_edge`` is the ``arte-edge`` command."""

from __future__ import annotations

import sys

from arte_edge.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m arte_edge.bench REQUEST``: run a `Request` given as JSON and print its rows as JSON lines.

This is how `bench.remote` starts a benchmark on a device: no command-line flags are involved.
"""

from __future__ import annotations

import sys

from arte_edge.bench.runner import run_request
from arte_edge.bench.settings import Reporter, Request
from arte_edge.errors import ArteError
from arte_edge.results.rows import Row

__all__ = ["main"]


class _Lines(Reporter):
    """Rows to stdout, one line a test to stderr."""

    _label = ""

    def progress(self, text: str) -> None:
        label = text.rpartition(": ")[0]
        if label != self._label:
            self._label = label
            self.note(label)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _print(row: Row) -> None:
    print(row.model_dump_json(), flush=True)


def main(request: str) -> int:
    """Run `request` and return the exit code: 0, or 1 if no test succeeded."""
    try:
        rows = run_request(Request.model_validate_json(request), _Lines(), _print)
    except ArteError as error:
        print(f"{error.message} {error.hint}".rstrip(), file=sys.stderr)
        return error.exit_code
    return int(not any(row.status == "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

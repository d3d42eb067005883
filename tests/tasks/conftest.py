"""Task folders made in code, valid until a test breaks them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

Rows = Iterable[dict[str, object]]

TASK_TOML = """\
name = "parity"
description = "Say whether a number is even or odd."
techniques = ["Look at the last digit.", "Halve the number."]

[answer]
kind = "choice"
choices = ["even", "odd"]
"""


def parity_rows(start: int, stop: int) -> list[dict[str, object]]:
    return [{"input": f"Is {n} even or odd?", "target": "odd" if n % 2 else "even"} for n in range(start, stop)]


@pytest.fixture
def write_jsonl() -> Callable[[Path, Rows], Path]:
    def write(path: Path, rows: Rows) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def parity(tmp_path: Path, write_jsonl: Callable[[Path, Rows], Path]) -> Path:
    """A valid task folder of 4 seed, 20 validation and 10 test rows."""
    folder = tmp_path / "parity"
    folder.mkdir()
    (folder / "task.toml").write_text(TASK_TOML, encoding="utf-8")
    write_jsonl(folder / "seed.jsonl", parity_rows(0, 4))
    write_jsonl(folder / "validation.jsonl", parity_rows(4, 24))
    write_jsonl(folder / "test.jsonl", parity_rows(24, 34))
    return folder

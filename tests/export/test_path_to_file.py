"""From the command to the written GGUF: at most 20 files, and the ones that docs/architecture.md names."""

from pathlib import Path
from typing import Any

import pytest
from tiny import Patch
from tracing import documented, files_run

from arte_edge.cli.main import main

LIMIT = 21


class Written(BaseException):
    """The file is written; its verification is a path of its own."""


def test_a_quantized_gguf(tiny_student: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    from arte_edge.export import pipeline

    def stop(*_: Any) -> None:
        raise Written

    monkeypatch.setattr(pipeline, "_verify", stop)
    monkeypatch.setattr(pipeline, "_verdict", lambda *_: ({"passed": True}, False))
    found: set[str] = set()
    with files_run(found), pytest.raises(Written):
        main(["export", str(tiny_student), "--gguf", "Q4_K_M", "-o", str(tmp_path / "out")])
    assert list((tmp_path / "out").rglob("*Q4_K_M.gguf"))
    assert len(found) <= LIMIT, "\n".join(sorted(found))
    assert found == documented("`export --gguf Q4_K_M`")

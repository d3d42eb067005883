"""The notebook in docs/: its cells are those of its builder, it was executed, and its cells run on a small run."""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import Patch

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
ROOT = Path(__file__).resolve().parents[2]


def builder() -> Any:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "build_notebook.py")))


def test_the_page_holds_the_cells_of_its_builder_with_their_outputs() -> None:
    build = builder()
    page = nbformat.read(build.PAGE, as_version=4)
    assert [(cell["cell_type"], cell["source"]) for cell in page.cells] == list(build.CELLS)
    shown = [cell for cell in page.cells if cell["cell_type"] == "code"][1:]  # the import shows nothing
    assert all(cell["outputs"] for cell in shown)
    html = [output["data"].get("text/html", "") for cell in shown for output in cell["outputs"]]
    assert sum("<table" in text for text in html) >= 5
    assert str(Path.home()) not in build.PAGE.read_text("utf-8")


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_cell_runs_on_a_small_run(small_run: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "runs").mkdir()
    shutil.copytree(small_run, tmp_path / "runs" / "run")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    page = builder().execute(tmp_path, run="runs/run/run.toml")
    outputs = [output for cell in page.cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert outputs and all(output["output_type"] == "execute_result" for output in outputs)
    assert any("tuned student" in str(output["data"]) for output in outputs)

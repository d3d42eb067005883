"""A real export, killed with SIGKILL at five random moments: no incomplete file has a final name, and it resumes."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import Patch

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytest.importorskip("torch")

from .conftest import visible

_KILLS, _MOST_FOLDERS = 5, 8
_RECIPE = """
[gguf]
imatrix_prompts = 6
[verify]
prompts = 4
examples = 4
[verify.thresholds.Q4_0]
kl_mean = 1e-9 # a rejected file has to survive too
"""


def start(run: Path, out: Path) -> subprocess.Popen[bytes]:
    recipe = run.parent / "kill.toml"
    recipe.write_text(_RECIPE)
    command = [sys.executable, "-m", "arte_edge", "export", str(run), "--recipe", str(recipe)]
    command += ["--gguf", "Q8_0,Q4_0,F16", "-o", str(out)]
    log = (run.parent / "log").open("ab")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ARTE_EDGE_THREADS": "1"}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def finish(run: Path, out: Path) -> None:
    code = start(run, out).wait(timeout=560)
    assert code == 3, (run.parent / "log").read_text(errors="replace")[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_export_killed_five_times_shows_only_whole_files_and_ends_with_the_same_bytes(
    tiny_run: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("ARTE_EDGE_HOME", str(tmp_path / "home"))
    began = time.monotonic()
    finish(tiny_run, tmp_path / "alone")
    whole_s = time.monotonic() - began
    whole = visible(tmp_path / "alone")
    assert "tiny-Q4_0.gguf.rejected" in whole and "tiny-Q8_0.gguf" in whole

    moments = random.Random(4)
    kills = folder = 0
    while kills < _KILLS:
        out = tmp_path / f"killed-{folder}"
        began, process = time.monotonic(), start(tiny_run, out)
        try:
            process.wait(timeout=moments.uniform(0.2, 1.0) * whole_s)
            folder += 1  # it finished first: the next kill hits a fresh export, and earlier
            whole_s = min(whole_s, time.monotonic() - began)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        # Every file with a final name is the finished one, also Modelfile, tokenizer and student.json.
        shown = visible(out) if out.exists() else {}
        assert [name for name in shown if shown[name] != whole.get(name)] == []
        assert folder < _MOST_FOLDERS, "too few kills hit an export that was still at work"
    for number in range(folder + 1):
        finish(tiny_run, tmp_path / f"killed-{number}")
        assert visible(tmp_path / f"killed-{number}") == whole

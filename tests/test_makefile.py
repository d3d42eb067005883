"""`make setup` on a machine that cannot build: it says what is missing before anything is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*words: str) -> subprocess.CompletedProcess[str]:
    # `make test` runs these tests, and its own flags must not reach the make that is tested.
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *words], cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


def test_help_lists_the_targets_that_ci_and_the_readme_name() -> None:
    listed = [line.split()[0] for line in make("help").stdout.splitlines()]
    assert {"setup", "quickstart", "test", "check", "docs", "clean"} <= set(listed)


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" || exit 1\n', encoding="utf-8")
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    assert "Python 3.9.1, and 3.11 or newer is needed" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [("PYTHON=no-such-python", "no-such-python was not found"), ("CXX=no-such-compiler", "no C++ compiler")],
)
def test_setup_names_the_missing_tool(tmp_path: Path, setting: str, message: str) -> None:
    done = make("setup", setting, f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()

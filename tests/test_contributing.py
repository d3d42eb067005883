"""The contributor's commands: the same on a machine, in a commit hook and in every CI; setup says what is missing."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def load(path: Path) -> dict[Any, Any]:
    parsed: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return parsed


def make_targets(text: str) -> list[str]:
    return re.findall(r"^(?:run: )?make ([a-z ]+?)\b(?: \|\|.*)?$", text, flags=re.MULTILINE)


def test_the_workflow_runs_what_ci_and_the_contributor_run() -> None:
    job = load(WORKFLOW)["jobs"]["test"]
    here = make_targets("\n".join(step["run"] for step in job["steps"] if "run" in step))
    assert here == make_targets((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    defined = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"check", "test"} <= set(here)
    assert all(f"make {target} " in guide and target in defined for target in here)


def test_the_workflow_covers_x86_arm_and_macos_and_may_only_read() -> None:
    workflow = load(WORKFLOW)
    job = workflow["jobs"]["test"]
    rows = [(row["os"], row["python"]) for row in job["strategy"]["matrix"]["include"]]
    systems = {os for os, _ in rows}
    assert any(os.startswith("ubuntu") and not os.endswith("-arm") for os in systems)
    assert any(os.startswith("ubuntu") and os.endswith("-arm") for os in systems)
    assert any(os.startswith("macos") for os in systems)
    assert {os for os, python in rows if python == "3.11"} == systems
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    used = [step["uses"] for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", name) for name in used), "pin by commit"


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*words: str) -> subprocess.CompletedProcess[str]:
    # `make test` runs these tests, and its own flags must not reach the make that is tested.
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *words], cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


@needs_make
def test_help_lists_the_targets_that_ci_and_the_readme_name() -> None:
    listed = [line.split()[0] for line in make("help").stdout.splitlines()]
    assert {"setup", "quickstart", "test", "check", "docs", "clean"} <= set(listed)


@needs_make
def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" || exit 1\n', encoding="utf-8")
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    assert "Python 3.9.1, and 3.11 or newer is needed" in done.stderr
    assert not (tmp_path / "venv").exists()


@needs_make
@pytest.mark.parametrize(
    ("setting", "message"),
    [("PYTHON=no-such-python", "no-such-python was not found"), ("CXX=no-such-compiler", "no C++ compiler")],
)
def test_setup_names_the_missing_tool(tmp_path: Path, setting: str, message: str) -> None:
    done = make("setup", setting, f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()

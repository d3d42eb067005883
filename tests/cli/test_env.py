"""``arte-edge env`` and shell completion."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import Capture, Patch, cli_json

from arte_edge.cli.main import main


def test_env_names_versions_and_what_is_missing(capsys: Capture) -> None:
    found = cli_json(capsys, "env")
    assert found["python"].endswith(platform.python_version())
    assert found["packages"]["numpy"] and found["extras"]["gguf"]
    assert found["cores"] >= 1 and found["memory_bytes"] > 0


def test_env_holds_nothing_private(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("ARTE_EDGE_CACHE", "/somewhere/of/mine")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "HF_TOKEN" in text  # that it is set explains behaviour; its value is nobody's business
    for private in ("hf_secret", "/somewhere/of/mine", str(Path.home()), platform.node()):
        assert private not in text
    if len(getpass.getuser()) > 4:  # "root" may be part of another word
        assert getpass.getuser() not in text


def test_env_loads_no_runtime() -> None:
    code = "import sys; from arte_edge.cli.env import environment as e; print(e(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_offers_the_verbs(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "arte_edge"],
        env=os.environ
        | {
            "_ARTE_EDGE_COMPLETE": f"complete_{shell}",
            "_TYPER_COMPLETE_ARGS": "arte-edge di",
            "COMP_WORDS": "arte-edge di",
            "COMP_CWORD": "1",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "distill" in done.stdout, done.stderr

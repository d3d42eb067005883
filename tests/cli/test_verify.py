"""``arte-edge verify``: the table, the JSON and the exit code, on tiny models made in code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import Capture, Folders, Patch, cli

pytest.importorskip("torch")
pytest.importorskip("transformers")


def write_checkpoint(folder: Path, seed: int = 0, template: str = "") -> Path:
    tiny.write_student(folder, seed)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: Folders) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("a") / "student")


def test_a_model_matches_itself_and_the_table_fits_80_columns(
    capsys: Capture, student: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = cli(capsys, "verify", str(student), str(student))
    assert code == 0
    assert max(map(len, out.splitlines()[3:])) <= 80
    for check in ("tokens", "template", "stop tokens", "kl mean", "top-1 agreement", "perplexity ratio"):
        assert check in out
    assert "Passed" in out and "thresholds of F16" in out
    assert "comparing logits" in err and "comparing logits" not in out


def test_another_model_ends_with_3_and_says_what_differs(capsys: Capture, student: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1, template="{{ messages[-1].content }} !")
    code, out, err = cli(capsys, "verify", str(student), str(other))
    assert code == 3
    assert "FAILED" in out and "Failed" in out
    assert "template: " in out and "kl mean: " in out
    assert "other" in err and "student" in err and "template" in err


def test_json_is_the_verdict_on_one_line_whatever_the_exit_code(capsys: Capture, student: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    code, out, _ = cli(capsys, "verify", str(student), str(other), "--json")
    verdict: dict[str, Any] = json.loads(out)
    assert code == 3 and verdict["passed"] is False
    assert {c["name"] for c in verdict["checks"] if not c["passed"]} >= {"kl mean", "kl p99"}
    assert "kl mean" in verdict["reason"] and verdict["fidelity"]["n_tokens"] > 100
    assert str(tmp_path) not in out


def test_a_type_sets_the_thresholds_and_prompts_can_be_given(capsys: Capture, student: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("the cat sat on a mat\nwhat two and three are\n", encoding="utf-8")
    code, out, _ = cli(
        capsys, "verify", str(student), str(student), "--type", "int4", "--prompts", str(prompts), "--json"
    )
    verdict = json.loads(out)
    assert code == 0 and verdict["fidelity"]["n_prompts"] == 2
    assert next(c["threshold"] for c in verdict["checks"] if c["name"] == "perplexity ratio") == 1.1


def test_a_task_adds_the_paired_accuracy(capsys: Capture, student: Path) -> None:
    code, out, _ = cli(capsys, "verify", str(student), str(student), "--task", "home_intents", "--limit", "3", "--json")
    verdict = json.loads(out)
    assert code == 0
    assert (verdict["accuracy"]["n"], verdict["accuracy"]["split"]) == (3, "validation")
    assert verdict["accuracy"]["difference"] == 0.0


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all"])
def test_a_file_that_no_runtime_opens_is_a_failed_check(
    capsys: Capture, student: Path, tmp_path: Path, content: bytes
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    code, out, _ = cli(capsys, "verify", str(student), str(broken))
    assert code == 3
    assert "opens" in out and "broken.gguf" in out

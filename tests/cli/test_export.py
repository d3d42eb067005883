"""`export` and `verify` from the outside: lists, plans, exit codes, tables. See tests/export and tests/verify."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import Capture, Folders, Patch, cli, cli_json

from arte_edge.cli.main import main
from arte_edge.errors import ArteError
from arte_edge.export.chat import Chat
from arte_edge.export.outcome import Failure, Outcome
from arte_edge.export.source import Source
from arte_edge.models.artifact import format_of
from arte_edge.results.student_json import Artifact, Fidelity, Lineage, StudentFile

NAME = "a-student-with-a-long-name"


def artifact(label: str, status: str = "ok") -> Artifact:
    format = format_of(label)
    right = {"split": "validation", "n": 100, "low": 0.2, "high": 0.375}
    fidelity = Fidelity(passed=status == "ok", metrics=tiny.metrics(kl_mean=0.0312, top1=0.931))
    more = {"status": status, "reason": "" if status == "ok" else "tokens: cut otherwise\nkl mean: 0.5: gibberish"}
    more |= {"file": format.file_name(NAME) + ("" if status == "ok" else ".rejected") + "/" * format.is_folder}
    more |= {"size_bytes": 105_454_624, "bits_per_weight": 6.17, "fidelity": fidelity}
    return tiny.artifact(format.type, format=format.family, accuracy=tiny.accuracy(28, **right), **more)


@pytest.fixture
def verb(monkeypatch: Patch, tmp_path: Path) -> Any:
    """Run the verb with an export that ends as the test says; return exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, artifacts: tuple[Artifact, ...] = (), failures: tuple[Failure, ...] = ()) -> int:
        seen = Outcome(tiny.student_file(*artifacts, name=NAME), artifacts, failures)
        monkeypatch.setattr("arte_edge.export.pipeline.export", lambda *a, **k: seen)
        source = Source("m", tmp_path, Chat(None), Lineage(source="checkpoint"))
        monkeypatch.setattr("arte_edge.export.source.open_source", lambda *a, **k: source)
        return main(["export", *words])

    return run


def test_the_list_names_recipes_and_formats(capsys: Capture) -> None:
    assert main(["export", "--list"]) == 0
    printed = capsys.readouterr().out
    for word in ("raspberry-pi-5", "browser-onnx", "Q4_K_M", "optimum-int8-arm64"):
        assert word in printed
    document = cli_json(capsys, "export", "--list")
    assert {row["name"] for row in document["recipes"]} >= {"laptop", "f16", "everything"}


def test_all_accepted_ends_with_0_and_a_table_of_80_columns(verb: Any, capsys: Capture) -> None:
    labels = ("Q4_K_M", "Q8_0", "int4", "optimum-int8-avx512")
    assert verb("m", "-o", "out", artifacts=tuple(map(artifact, labels))) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if re.search(r"─|\bok\b|verdict", line)]
    assert len(table) == 2 + len(labels) and max(map(len, table)) <= 80
    for word in ("105.5 MB", "6.17", "0.0312", "93.1%", "28% (20–38)", "ok", "accuracy", "bits/w"):
        assert word in printed


def test_a_rejected_file_ends_with_3_and_says_why(verb: Any, capsys: Capture) -> None:
    assert verb("m", "-o", "out", artifacts=(artifact("Q8_0"), artifact("Q4_K_M", "rejected"))) == 3
    printed = capsys.readouterr()
    assert "gibberish" in printed.out
    assert "Q4_K_M.gguf.rejected" in printed.err


def test_a_format_that_could_not_be_made_ends_with_its_own_code(verb: Any, capsys: Capture) -> None:
    failure = Failure(format_of("optimum-fp32"), ArteError("no optimum here", "pip install it"))
    assert verb("m", "-o", "out", artifacts=(artifact("Q8_0"),), failures=(failure,)) == 1
    assert "pip install it" in capsys.readouterr().out
    # A rejected file weighs more than one that is missing.
    assert verb("m", "-o", "out", artifacts=(artifact("Q8_0", "rejected"),), failures=(failure,)) == 3


def test_json_ends_with_the_whole_student(verb: Any, capsys: Capture) -> None:
    assert verb("m", "-o", "out", "--json", artifacts=(artifact("Q8_0", "rejected"),)) == 3
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["event"] == "done" and last["rejected"] == ["a-student-with-a-long-name-Q8_0.gguf.rejected"]
    assert StudentFile.model_validate(last["student"]).artifacts[0].status == "rejected"


def test_a_dry_run_prints_sizes_and_memory_and_writes_nothing(
    monkeypatch: Patch, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("gguf")
    source = Source("m", tmp_path, Chat(None), Lineage(source="checkpoint"))
    monkeypatch.setattr("arte_edge.export.source.open_source", lambda *a, **k: source)
    shapes = {"model.embed_tokens.weight": (49152, 576), "model.norm.weight": (576,)}
    monkeypatch.setattr("arte_edge.checkpoint.shapes_of", lambda path: shapes)
    words = ["export", "m", "--gguf", "Q4_K_M,F16", "--dry-run", "-o", str(tmp_path / "out")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "m-Q4_K_M.gguf" in printed and "Memory" in printed
    plan = cli_json(capsys, *words)
    assert [row["quantization"] for row in plan["artifacts"]] == ["Q4_K_M", "F16"]
    assert plan["memory_bytes_rough"] > 0
    assert not (tmp_path / "out").exists()


def write_checkpoint(folder: Path, seed: int = 0, template: str = "") -> Path:
    tiny.write_student(folder, seed)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: Folders) -> Path:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
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

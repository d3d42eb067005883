"""The verb from the outside: lists, plans, exit codes, the table. The export itself is tested in tests/export."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from arte_edge.cli.main import main
from arte_edge.errors import ArteError
from arte_edge.export.chat import Chat
from arte_edge.export.outcome import Failure, Outcome
from arte_edge.export.source import Source
from arte_edge.models.artifact import format_of
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.student_json import Artifact, Fidelity, FidelityMetrics, Lineage, Student, StudentFile

SUM = "ef" * 32
STUDENT = Student(
    name="a-student-with-a-long-name",
    sha256=SUM,
    architecture="llama",
    dtype="F16",
    parameter_count=134_515_008,
)


def artifact(label: str, status: str = "ok") -> Artifact:
    format = format_of(label)
    metrics = FidelityMetrics(
        n_prompts=24,
        n_tokens=2600,
        kl_mean=0.0312,
        kl_p99=0.4,
        kl_max=1.0,
        top1=0.931,
        perplexity_reference=5.0,
        perplexity_ratio=1.02,
        perplexity_ratio_error=0.01,
    )
    name = format.file_name(STUDENT.name) + ("" if status == "ok" else ".rejected")
    return Artifact.model_validate(
        {
            "file": name + ("/" if format.is_folder else ""),
            "format": format.family,
            "quantization": format.type,
            "status": status,
            "reason": "" if status == "ok" else "tokens: cut otherwise\nkl mean: 0.5: gibberish",
            "size_bytes": 105_454_624,
            "sha256": SUM,
            "tensor_sha256": SUM,
            "bits_per_weight": 6.17,
            "fidelity": Fidelity(passed=status == "ok", metrics=metrics, prompts_from="validation of parity"),
            "accuracy": PairedAccuracy(
                split="validation", n=100, right=28, accuracy=0.28, low=0.2, high=0.375
            ),
        }
    )


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run the verb with an export that ends as the test says; return exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, artifacts: tuple[Artifact, ...] = (), failures: tuple[Failure, ...] = ()) -> int:
        document = StudentFile(
            arte_edge_version="0", student=STUDENT, lineage=Lineage(source="run"), artifacts=artifacts
        )
        seen = Outcome(document, artifacts, failures)
        monkeypatch.setattr("arte_edge.export.pipeline.export", lambda *a, **k: seen)
        source = Source("m", tmp_path, Chat(None), Lineage(source="checkpoint"))
        monkeypatch.setattr("arte_edge.export.source.open_source", lambda *a, **k: source)
        return main(["export", *words])

    return run


def test_the_list_names_recipes_and_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--list"]) == 0
    printed = capsys.readouterr().out
    for word in ("raspberry-pi-5", "browser-onnx", "Q4_K_M", "optimum-int8-arm64"):
        assert word in printed
    assert main(["export", "--list", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in document["recipes"]} >= {"laptop", "f16", "everything"}


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ([], "SOURCE"),
        (["x", "--gguf", "Q4_KM"], "Q4_K_M"),
        (["x", "--onnx", "intt4"], "int4"),
        (["x", "--recipe", "rasberry-pi-5"], "raspberry-pi-5"),
        (["./nowhere", "--gguf", "F16"], "no such file"),
    ],
)
def test_what_the_user_got_wrong_ends_with_2(
    words: list[str], printed: str, capsys: pytest.CaptureFixture[str], model_cache: Path
) -> None:
    assert main(["export", *words]) == 2
    assert printed in capsys.readouterr().err


def test_all_accepted_ends_with_0_and_a_table_of_80_columns(
    verb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ("Q4_K_M", "Q8_0", "int4", "optimum-int8-avx512")
    assert verb("m", "-o", "out", artifacts=tuple(map(artifact, labels))) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if re.search(r"─|\bok\b|verdict", line)]
    assert len(table) == 2 + len(labels) and max(map(len, table)) <= 80
    for word in ("105.5 MB", "6.17", "0.0312", "93.1%", "28% (20–38)", "ok", "accuracy", "bits/w"):
        assert word in printed


def test_a_rejected_file_ends_with_3_and_says_why(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("m", "-o", "out", artifacts=(artifact("Q8_0"), artifact("Q4_K_M", "rejected"))) == 3
    printed = capsys.readouterr()
    assert "gibberish" in printed.out
    assert "Q4_K_M.gguf.rejected" in printed.err


def test_a_format_that_could_not_be_made_ends_with_its_own_code(
    verb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = Failure(format_of("optimum-fp32"), ArteError("no optimum here", "pip install it"))
    assert verb("m", "-o", "out", artifacts=(artifact("Q8_0"),), failures=(failure,)) == 1
    assert "pip install it" in capsys.readouterr().out
    # A rejected file weighs more than one that is missing.
    assert verb("m", "-o", "out", artifacts=(artifact("Q8_0", "rejected"),), failures=(failure,)) == 3


def test_json_ends_with_the_whole_student(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("m", "-o", "out", "--json", artifacts=(artifact("Q8_0", "rejected"),)) == 3
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["event"] == "done" and last["rejected"] == ["a-student-with-a-long-name-Q8_0.gguf.rejected"]
    assert StudentFile.model_validate(last["student"]).artifacts[0].status == "rejected"


def test_brackets_in_an_error_reach_the_user(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    failure = Failure(format_of("int4"), ArteError("needs x", "pip install 'arte-edge[onnx]'"))
    verb("m", "-o", "out", failures=(failure,))
    assert "arte-edge[onnx]" in capsys.readouterr().out


def test_a_dry_run_prints_sizes_and_memory_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [row["quantization"] for row in plan["artifacts"]] == ["Q4_K_M", "F16"]
    assert plan["memory_bytes_rough"] > 0
    assert not (tmp_path / "out").exists()

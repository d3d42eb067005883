"""``arte-edge recommend`` on the command line: 80 columns, JSON, and exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import Capture

from arte_edge.cli.main import main
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.student_json import (
    Artifact,
    Fidelity,
    Lineage,
    Speed,
    Student,
    StudentFile,
    write_student,
)

PI = ("--device", "raspberry-pi-5")


def artifact(name: str, size: int, char: str, decode: float, difference: float) -> Artifact:
    accuracy = PairedAccuracy(
        split="validation", n=40, right=16, accuracy=0.4, low=0.26, high=0.55, difference=difference,
        difference_low=difference - 0.1, difference_high=difference + 0.1, p_value=0.5,
    )  # fmt: skip
    speed = Speed(
        device="raspberry-pi-5", runtime="llama_cpp 0.3.36", threads=4, decode_tokens_per_s=decode,
        prefill_tokens_per_s=6 * decode, peak_rss_bytes=size + 90_000_000, fingerprint="0123456789abcdef",
    )  # fmt: skip
    return Artifact(
        file=f"my-quite-long-student-name-{name}.gguf", format="gguf", quantization=name, status="ok",
        size_bytes=size, sha256=char * 64, tensor_sha256=char * 64, bits_per_weight=5.5,
        fidelity=Fidelity(passed=True), accuracy=accuracy, speeds=(speed,),
    )  # fmt: skip


@pytest.fixture
def export(tmp_path: Path) -> Path:
    student = Student(
        name="my-quite-long-student-name", sha256="c" * 64, architecture="llama", dtype="F16", parameter_count=135
    )  # fmt: skip
    files = (artifact("Q8_0", 145_000_000, "a", 31.4, 0.0), artifact("Q4_K_M", 105_000_000, "b", 43.9, -0.05))
    document = StudentFile(
        arte_edge_version="0", student=student, lineage=Lineage(source="run"), artifacts=files
    )
    write_student(tmp_path / "run" / "export", document)
    return tmp_path / "run"


def test_the_answer_fits_into_80_columns_and_names_the_pick(export: Path, capsys: Capture) -> None:
    assert (
        main(["recommend", str(export), *PI, "--max-ram", "1GB", "--min-decode", "15", "--max-drop", "2"])
        == 0
    )
    out = capsys.readouterr().out
    table, _, words = out.partition("is excluded")
    assert max(map(len, table.splitlines())) <= 80
    assert max(map(len, words.splitlines())) <= 80
    words = " ".join(words.split())
    assert "Use my-quite-long-student-name-Q8_0.gguf." in words
    assert "only file that satisfies all constraints, at 31.4 tokens/s" in words
    assert "(--max-drop): 5.0 points lost (-15.0 to +5.0, p = 0.5, n = 40), not significant, limit 2" in words


def test_json_has_figures_with_their_evidence(export: Path, capsys: Capture) -> None:
    assert main(["recommend", str(export), "--device", "0123456789abcdef", "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["pick"] == "my-quite-long-student-name-Q4_K_M.gguf"
    first = document["files"][0]
    assert first["decode_tokens_per_s"] == {
        "value": 31.4,
        "evidence": "measured",
        "source": "llama_cpp 0.3.36, 4 threads",
    }
    assert first["answer_seconds"]["evidence"] == "predicted"  # arithmetic, though from measured rates
    assert str(export.parent) not in json.dumps(document)


def test_no_file_satisfies_all_constraints_is_exit_code_1_and_says_what_to_relax(
    export: Path, capsys: Capture
) -> None:
    assert main(["recommend", str(export), *PI, "--min-decode", "60", "--json"]) == 1
    done = capsys.readouterr()
    assert json.loads(done.out)["relax"] == [{"constraint": "min_decode", "to": 43.9}]
    assert "No file satisfies" in done.err and "Relax --min-decode 43.9." in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "raspberry-pi-55"], "raspberry-pi-5"),
        ([*PI, "--max-ram", "lots"], "--max-ram lots: not a size"),
    ],
)
def test_what_cannot_be_understood_is_exit_code_2(
    export: Path, capsys: Capture, arguments: list[str], said: str
) -> None:
    assert main(["recommend", str(export), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_without_files_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert main(["recommend", str(tmp_path), *PI]) == 2
    assert "arte-edge export RUN" in capsys.readouterr().err


def test_a_corrupt_student_json_is_refused(export: Path, capsys: Capture) -> None:
    (export / "export" / "student.json").write_text('{"schema_version": 1,')
    assert main(["recommend", str(export), *PI]) == 2
    assert "student.json" in capsys.readouterr().err

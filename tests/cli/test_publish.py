"""``arte-edge recommend`` and ``report``: 80 columns, JSON, and exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import Capture, accuracy, artifact, cli_json, student_file

from arte_edge.cli.main import main
from arte_edge.results.student_json import Artifact, Speed, write_student

PI = ("--device", "raspberry-pi-5")


NAME = "my-quite-long-student-name"


def file(kind: str, size: int, decode: float, difference: float) -> Artifact:
    ends = {"difference_low": difference - 0.1, "difference_high": difference + 0.1, "p_value": 0.5}
    rates = {"decode_tokens_per_s": decode, "prefill_tokens_per_s": 6 * decode, "fingerprint": "0123456789abcdef"}
    run = {"device": "raspberry-pi-5", "runtime": "llama_cpp 0.3.36", "threads": 4}
    speed = Speed(**run | rates, peak_rss_bytes=size + 90_000_000)
    right = accuracy(16, difference=difference, **ends)
    return artifact(kind, NAME, size_bytes=size, accuracy=right, speeds=(speed,))


@pytest.fixture
def export(tmp_path: Path) -> Path:
    files = (file("Q8_0", 145_000_000, 31.4, 0.0), file("Q4_K_M", 105_000_000, 43.9, -0.05))
    write_student(tmp_path / "run" / "export", student_file(*files, name=NAME))
    return tmp_path / "run"


def test_the_answer_fits_into_80_columns_and_names_the_pick(export: Path, capsys: Capture) -> None:
    constraints = ["--max-ram", "1GB", "--min-decode", "15", "--max-drop", "2"]
    assert main(["recommend", str(export), *PI, *constraints]) == 0
    out = capsys.readouterr().out
    table, _, words = out.partition("is excluded")
    assert max(map(len, table.splitlines())) <= 80
    assert max(map(len, words.splitlines())) <= 80
    words = " ".join(words.split())
    assert "Use my-quite-long-student-name-Q8_0.gguf." in words
    assert "only file that satisfies all constraints, at 31.4 tokens/s" in words
    assert "(--max-drop): 5.0 points lost (-15.0 to +5.0, p = 0.5, n = 40), not significant, limit 2" in words


def test_json_has_figures_with_their_evidence(export: Path, capsys: Capture) -> None:
    document: dict[str, Any] = cli_json(capsys, "recommend", str(export), "--device", "0123456789abcdef")
    assert document["pick"] == "my-quite-long-student-name-Q4_K_M.gguf"
    first = document["files"][0]
    measured = {"value": 31.4, "evidence": "measured", "source": "llama_cpp 0.3.36, 4 threads"}
    assert first["decode_tokens_per_s"] == measured
    assert first["answer_seconds"]["evidence"] == "predicted"  # arithmetic, though from measured rates
    assert str(export.parent) not in json.dumps(document)


def test_no_file_is_exit_code_1_with_what_to_relax(export: Path, capsys: Capture) -> None:
    assert main(["recommend", str(export), *PI, "--min-decode", "60", "--json"]) == 1
    done = capsys.readouterr()
    assert json.loads(done.out)["relax"] == [{"constraint": "min_decode", "to": 43.9}]
    assert "No file satisfies" in done.err and "Relax --min-decode 43.9." in done.err


def test_the_page_is_written_beside_the_run_and_missing_parts_named(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "run.toml").write_text('name = "r"\n')
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    out = capsys.readouterr().out
    assert "not included: check: this stage has not finished" in out
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'report.html'}"
    document = cli_json(capsys, "report", str(tmp_path), "-o", str(tmp_path / "x" / "y.html"))
    assert Path(document["report"]).is_file() and len(document["missing"]) == 9

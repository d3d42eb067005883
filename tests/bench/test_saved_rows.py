"""Rows of a student's files are kept beside them and merged into student.json, and never lost to a damaged one."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import Capture, artifact, cli, student_file

from arte_edge.bench.settings import find_targets
from arte_edge.models.artifact import checksums_of
from arte_edge.results.rows import read_rows
from arte_edge.results.student_json import write_student

QUICK = ["-p", "4", "-n", "8", "-r", "2", "--no-warmup", "-t", "1", "--no-roofline"]


@pytest.fixture
def bench_export(bench_gguf: Path, tmp_path: Path) -> Path:
    """An export with one file that passed the gate, and one that did not."""
    pytest.importorskip("llama_cpp")
    folder = tmp_path / "export"
    folder.mkdir()
    path = folder / bench_gguf.name
    shutil.copy(bench_gguf, path)
    sums = checksums_of(path)
    hashes = {"sha256": sums.sha256, "tensor_sha256": sums.tensor_sha256, "size_bytes": sums.size_bytes}
    good = artifact("F16", file=path.name, **hashes)
    bad = artifact("Q2_K", file="tiny-Q2_K.gguf.rejected", status="rejected")
    write_student(folder, student_file(good, bad, name="tiny"))
    return folder


def test_rows_are_kept_beside_student_json_unless_told_otherwise(capsys: Capture, bench_export: Path) -> None:
    code, _, _ = cli(capsys, "bench", str(bench_export), *QUICK, "--no-save")
    assert code == 0 and not (bench_export / "bench.jsonl").exists()
    before = json.loads((bench_export / "student.json").read_text())
    code, out, _ = cli(capsys, "bench", str(bench_export), *QUICK, "-o", "json")
    assert code == 0
    rows = read_rows(bench_export / "bench.jsonl")
    assert [row.model_dump(mode="json") for row in rows] == json.loads(out)
    after = json.loads((bench_export / "student.json").read_text())
    assert before["artifacts"][0]["speeds"] == []
    (speed,) = after["artifacts"][0]["speeds"]
    assert speed["threads"] == 1
    assert {test["test"]: test["tokens_per_s"] > 0 for test in speed["tests"]} == {"pp4": True, "tg8": True}


def test_a_damaged_student_json_does_not_lose_the_measurement(capsys: Capture, bench_export: Path) -> None:
    model = next(bench_export.glob("*.gguf"))
    (bench_export / "student.json").write_text("{")
    code, _, err = cli(capsys, "bench", str(model), *QUICK)
    assert code == 0
    assert len(read_rows(bench_export / "bench.jsonl")) == 2
    assert "not merged" in err
    assert (bench_export / "student.json").read_text() == "{"


def test_a_runs_folder_names_what_is_missing(capsys: Capture, bench_export: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(bench_export, run_folder / "export")
    assert find_targets([str(run_folder)], pytest.fail) == [run_folder / "export" / "tiny-F16.gguf"]
    (run_folder / "export" / "tiny-F16.gguf").unlink()
    code, _, err = cli(capsys, "bench", str(run_folder))
    assert code == 2 and "tiny-F16.gguf is missing" in err
    shutil.rmtree(run_folder / "export")
    (run_folder / "run.toml").touch()
    code, _, err = cli(capsys, "bench", str(run_folder))
    assert code == 2 and "nothing is exported yet" in err

"""``arte-edge bench`` and ``compare``: data on stdout in every format, exit codes, and a table of 80 columns."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import Capture, artifact, cli, cli_json, quality_row, speed_row, student_file

from arte_edge.bench import runner
from arte_edge.bench.settings import find_targets
from arte_edge.cli.main import main
from arte_edge.models.artifact import checksums_of
from arte_edge.results.rows import QualityRow, Row, SpeedRow, append_rows, read_rows
from arte_edge.results.student_json import write_student

QUICK = ["-p", "4", "-n", "8", "-r", "2", "--no-warmup", "-t", "1", "--no-roofline"]


def test_a_table_on_stdout_and_progress_on_stderr(capsys: Capture) -> None:
    code, out, err = cli(capsys, "bench", "null:1", *QUICK)
    assert code == 0
    assert "| pp4 " in out and "| tg8 " in out
    assert max(map(len, out.splitlines())) <= 80
    assert "1/2 null:1 pp4" in err and "|" not in err


def test_json_lines_and_csv_say_the_same(capsys: Capture, tmp_path: Path) -> None:
    for form in ("json", "jsonl", "csv"):
        file = tmp_path / f"rows.{form}"
        code, out, _ = cli(capsys, "bench", "null", *QUICK, "-o", form, "--output-file", str(file))
        assert code == 0
        assert file.read_text() == out
        if form == "csv":
            assert out.splitlines()[0].startswith("schema_version,status,reason,test,")
            continue
        rows = json.loads(out) if form == "json" else [json.loads(line) for line in out.splitlines()]
        assert [SpeedRow.model_validate(row).test for row in rows] == ["pp4", "tg8"]
        fields = "avg_ts stddev_ts samples_ns samples_ts n_prompt n_gen model_filename"
        assert set(fields.split()) <= set(rows[0])
    _, out, _ = cli(capsys, "bench", "null", *QUICK, "-n", "0", "--json")
    assert len(json.loads(out)) == 1


def test_lists_sweep(capsys: Capture) -> None:
    words = ["-p", "2-4+2", "-n", "0", "-t", "1,2", "-r", "1", "--no-warmup", "-o", "jsonl"]
    _, out, _ = cli(capsys, "bench", "null", *words)
    rows = [json.loads(line) for line in out.splitlines()]
    found = [(row["n_threads"], row["test"]) for row in rows]
    assert found == [(1, "pp2"), (1, "pp4"), (2, "pp2"), (2, "pp4")]


def test_if_all_tests_fail_the_exit_code_is_1_and_rows_are_printed(capsys: Capture) -> None:
    code, out, err = cli(capsys, "bench", "null:1000", "-p", "9", "-n", "0", "--timeout", "1.5", "-o", "json")
    assert code == 1
    assert json.loads(out)[0]["status"] == "timeout"
    assert "--timeout" in err


def test_the_verb_and_its_child_need_no_torch_and_no_runtime(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'scipy', 'trl'): sys.modules[name] = None\n"
        "from arte_edge.cli.main import main\n"
        f"sys.exit(main(['bench', 'null', *{QUICK!r}, '-o', 'json']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 2


def speed(name: str, test: str, rate: float, **more: Any) -> SpeedRow:
    samples = tuple(rate * factor for factor in (0.99, 1.0, 1.01, 1.0))
    times = tuple(int(1e9 * int(test[2:]) / sample) for sample in samples)
    known = {"model_filename": name, "tensor_sha256": "", "peak_rss_bytes": 300 << 20}
    return speed_row(test, rate, **known | {"samples_ts": samples, "samples_ns": times} | more)


def quality(name: str, right: int) -> QualityRow:
    answers = tuple((f"{i:016x}", "on", i < right) for i in range(100))
    times = {"answer_seconds_p50": 0.8, "answer_seconds_p95": 1.2}
    return quality_row(right, model_filename=name, tensor_sha256="", answers=answers, low=0, high=1, **times)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[str, str]:
    a, b = "a-student-with-a-rather-long-name-as-people-give-them-Q8_0.gguf", "student-Q4_K_M.gguf"
    append_rows(tmp_path / "a.jsonl", [speed(a, "pp512", 1234.5), speed(a, "tg128", 20), quality(a, 90)])
    append_rows(tmp_path / "b.jsonl", [speed(b, "pp512", 900), speed(b, "tg128", 30), quality(b, 80)])
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")


def test_the_table_has_ratio_interval_and_verdict(sides: tuple[str, str], capsys: Capture) -> None:
    assert main(["compare", *sides]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith(("pp", "tg"))}
    assert "1.500 [1.4" in lines["tg128"] and lines["tg128"].endswith("faster")
    assert lines["pp512"].endswith("slower")
    assert "A 90/100 = 90.0%, B 80/100 = 80.0%; B - A -10.0%" in " ".join(out.split())
    assert "p = 0.002: worse" in " ".join(out.split())
    assert "A 0.80 s (p95 1.20)" in out and "A 300 MiB, B 300 MiB" in out


def test_json_holds_the_same(sides: tuple[str, str], capsys: Capture) -> None:
    document = cli_json(capsys, "compare", *sides)
    assert [one["verdict"] for one in document["speeds"]] == ["slower", "faster"]
    assert document["speeds"][1]["ratio"]["value"] == pytest.approx(1.5)
    assert document["qualities"][0]["paired"]["difference"] == pytest.approx(-0.1)


def test_another_protocol_ends_with_2_and_force_shows_it(tmp_path: Path, capsys: Capture) -> None:
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    append_rows(Path(files[0]), [speed("m.gguf", "tg128", 20)])
    append_rows(Path(files[1]), [speed("m.gguf", "tg64", 30, n_threads=2)])
    assert main(["compare", *files]) == 2
    said = capsys.readouterr()
    assert "n_gen 128 against 64; n_threads 4 against 2" in " ".join(said.err.split()) and not said.out
    assert main(["compare", *files, "--force"]) == 0
    out = capsys.readouterr().out
    assert "1.5" in out and "n_gen 128 against 64" in out


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


def test_a_benchmark_that_is_interrupted_keeps_the_rows_until_then(bench_export: Path) -> None:
    def interrupt(row: Row) -> None:
        assert read_rows(bench_export / "bench.jsonl") == [row], "on the disk before anything else happens"
        raise KeyboardInterrupt

    settings: dict[str, Any] = {"n_prompt": 4, "n_gen": 8, "repetitions": 1, "warmup": False, "roofline": False}
    with pytest.raises(KeyboardInterrupt):
        runner.bench(bench_export, on_row=interrupt, threads=1, **settings)
    (speed,) = json.loads((bench_export / "student.json").read_text())["artifacts"][0]["speeds"]
    assert [test["test"] for test in speed["tests"]] == ["pp4"]


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

"""``arte-edge bench``: data on stdout in every format, a wrong word is exit 2, help comes at once."""

import json
import subprocess
import sys
from pathlib import Path

from tiny import Capture, cli

from arte_edge.results.rows import SpeedRow

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

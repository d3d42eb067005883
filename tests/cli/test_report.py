"""``arte-edge report`` on the command line."""

from pathlib import Path

from tiny import Capture, cli_json

from arte_edge.cli.main import main


def test_the_page_is_written_beside_the_run_and_missing_parts_named(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "run.toml").write_text('name = "r"\n')
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    out = capsys.readouterr().out
    assert "not included: check: this stage has not finished" in out
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'report.html'}"
    document = cli_json(capsys, "report", str(tmp_path), "-o", str(tmp_path / "x" / "y.html"))
    assert Path(document["report"]).is_file() and len(document["missing"]) == 9

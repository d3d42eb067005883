"""A push over real HTTP, to a Hub in this process."""

from pathlib import Path

import pytest
from tiny import Capture, Make, Patch, cli_json, speed_row

from arte_edge.cli.main import main

REPO = "ada/tiny-GGUF"
NAME = "tiny-Q8_0.gguf"


@pytest.fixture
def ready(export_folder: Path, capsys: Capture) -> Path:
    """An export as `arte-edge bench` and `arte-edge card` leave it."""
    lines = [speed_row("tg128", 20.5), speed_row("pp512", 150.0)]
    (export_folder / "bench.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in lines))
    assert main(["card", str(export_folder)]) == 0
    capsys.readouterr()
    return export_folder


def test_nothing_is_sent_without_yes(ready: Path, hub: Make, capsys: Capture) -> None:
    server = hub()
    assert main(["push", str(ready), "--to", REPO]) == 0
    out = capsys.readouterr().out
    assert server.requests == []
    for part in (REPO, NAME, "base_model: HuggingFaceTB/SmolLM2-135M-Instruct", "tiny-Q4_K_M.gguf.rejected: "):
        assert part in out


def test_with_yes_the_hub_has_what_the_preview_showed(ready: Path, hub: Make, capsys: Capture) -> None:
    server = hub()
    shown = cli_json(capsys, "push", str(ready), "--to", REPO, "--private", "--yes")
    assert set(server.files) == {file["file"] for file in shown["files"]}
    assert all(server.files[name] == (ready / name).read_bytes() for name in server.files)
    assert "tiny-Q4_K_M.gguf.rejected" not in server.files
    assert server.repos[REPO]["visibility"] == "private"
    assert shown["sent"]["url"].endswith(REPO)
    assert any("validate-yaml" in request for request in server.requests)  # the Hub judged the card


def test_a_push_cut_off_resumes_and_sends_large_files_once(ready: Path, hub: Make, capsys: Capture) -> None:
    server = hub()
    server.fail_uploads = 1
    assert main(["push", str(ready), "--to", REPO, "--yes"]) == 1
    assert server.commits == []
    for _ in range(2):
        assert main(["push", str(ready), "--to", REPO, "--yes"]) == 0
    puts = [request for request in server.requests if request.startswith("PUT")]
    assert len(puts) == 2  # the one that failed, and one
    assert server.files[NAME] == (ready / NAME).read_bytes()


def test_something_personal_stops_it_before_the_hub_is_asked(ready: Path, hub: Make, capsys: Capture) -> None:
    server = hub()
    card = ready / "README.md"
    card.write_text(card.read_text() + "on 192.168.7.9\n")
    assert main(["push", str(ready), "--to", REPO, "--yes"]) == 2
    error = capsys.readouterr().err
    assert "README.md:" in error and "192.168.7.9" in error and server.requests == []
    assert main(["push", str(ready), "--to", REPO, "--yes", "--allow", "192.168.7.9"]) == 0
    assert "README.md" in server.files


def test_no_message_or_file_has_a_token(ready: Path, hub: Make, capsys: Capture, monkeypatch: Patch) -> None:
    server = hub()
    token = "hf_" + "x" * 34
    card = ready / "README.md"
    before = card.read_text()
    card.write_text(f"{before}{token}\n")
    assert main(["push", str(ready), "--to", REPO, "--yes"]) == 2
    card.write_text(before)
    server.refuse = 403
    assert main(["push", str(ready), "--to", REPO, "--yes"]) == 2
    monkeypatch.setenv("HF_TOKEN", token.replace("x", "y"))
    server.refuse = 0
    assert main(["push", str(ready), "--to", REPO, "--yes"]) == 2
    printed = "".join(capsys.readouterr())
    assert "no write access" in printed and server.files == {}
    assert token not in printed and "yyyyyyyy" not in printed


def test_no_token_says_how_to_log_in(ready: Path, hub: Make, capsys: Capture, monkeypatch: Patch) -> None:
    server = hub()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(ready / "none"))
    assert main(["push", str(ready), "--to", REPO, "--yes"]) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert server.requests == []


def test_an_unreachable_hub_is_exit_code_1(ready: Path, hub: Make, capsys: Capture) -> None:
    server = hub()
    server.shutdown()
    server.server_close()
    assert main(["push", str(ready), "--to", REPO, "--yes"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_the_checkpoints_card_is_written_beside_it(ready: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    before = {path: path.read_bytes() for path in ready.iterdir()}
    assert main(["card", str(ready), "--checkpoint", str(folder)]) == 0
    assert "base_model_relation: finetune" in (folder / "README.md").read_text()
    assert {path: path.read_bytes() for path in ready.iterdir()} == before


def test_a_second_card_changes_nothing_and_a_dry_run_writes_nothing(ready: Path, capsys: Capture) -> None:
    assert cli_json(capsys, "card", str(ready))["changed"] == []
    (ready / "README.md").unlink()
    assert main(["card", str(ready), "--dry-run", "--base-model", "ada/tiny"]) == 0
    assert "base_model_relation: quantized" in capsys.readouterr().out
    assert not (ready / "README.md").exists()

import json
import struct
from pathlib import Path

import pytest
from tiny import Capture, Make, Patch, cli_json, speed_row

from arte_edge.cli.main import main
from arte_edge.device.profiles import add_device
from arte_edge.errors import InputError
from arte_edge.gguf.reader import Field
from arte_edge.gguf.writer import rewrite
from arte_edge.pii_scan import Machine
from arte_edge.publish.card.card import write_card, write_keys
from arte_edge.publish.hub import _own_hosts, preview
from arte_edge.results.merge import merge_rows
from arte_edge.results.student_json import Asking, read_student, write_student

FOLDERS = ("/root/secret-project", "/srv1/ada-work", "/root")
MACHINE = Machine(frozenset({"ada", "tinker-box"}), FOLDERS, frozenset({"s3cr3t-token"}))


@pytest.fixture
def ready(export_folder: Path) -> Path:
    """An export with results, a card, and raw rows beside it."""
    row = speed_row("tg128", 20.5)
    merge_rows(export_folder, [row])
    write_keys(export_folder)
    write_card(export_folder, read_student(export_folder))
    (export_folder / "bench.jsonl").write_text(row.model_dump_json() + "\n")
    return export_folder


def found(folder: Path, **more: object) -> list[str]:
    return [f"{f.file}:{f.key}: {f.text}" for f in preview(folder, MACHINE, **more).findings]  # type: ignore[arg-type]


def test_what_is_sent_is_what_belongs_to_the_student_and_nothing_else(ready: Path) -> None:
    (ready / "notes.txt").write_text("private")
    (ready / ".env").write_text("KEY=1")
    shown = preview(ready, MACHINE)
    assert [*shown.files] == ["README.md", "bench.jsonl", "student.json", "tiny-Q8_0.gguf"]
    assert shown.size_bytes == sum((ready / name).stat().st_size for name in shown.files)
    assert dict(shown.excluded) == {
        ".env": "not part of the student",
        "notes.txt": "not part of the student",
        "tiny-Q4_K_M.gguf.rejected": "rejected by the gate",
    }
    assert shown.findings == ()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in shown.head


def test_the_grammar_of_the_answers_is_sent(ready: Path) -> None:
    student = read_student(ready) or pytest.fail("no student.json")
    files = {"grammar": "answer.gbnf", "json_schema": "answer.schema.json"}
    asking = Asking(form="answer", instruction="Do.", answer_tokens=4, **files)
    write_student(ready, student.model_copy(update={"asking": asking}))
    for name in files.values():
        (ready / name).write_text("{}")
    shown = preview(ready, MACHINE)
    assert set(files.values()) <= set(shown.files) and len(shown.excluded) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("made on tinker-box", "tinker-box"),
        ("by ada.", "ada"),
        ("see /root/secret-project/x", "/root/secret-project/x"),
        ("in /home/grace/models", "/home/grace/models"),
        ("under /srv1/ada-work/x", "/srv1/ada-work"),
        (r"in C:\Users\grace\models", r"C:\Users\grace"),
        ("in ~/models/x", "~/models/x"),
        ("at 192.168.1.20", "192.168.1.20"),
        ("at fe80::1ff:fe23:4567:890a", "fe80::1ff:fe23:4567:890a"),
        ("mac b8:27:eb:12:34:56", "b8:27:eb:12:34:56"),
        ("with hf_abcdefghijklmnopqrstu", "hf_abc…"),
        ("with s3cr3t-token", "s3cr3t…"),
    ],
)
def test_a_personal_word_is_found_in_the_card_with_its_line(ready: Path, text: str, said: str) -> None:
    card = ready / "README.md"
    lines = card.read_text().count("\n")
    card.write_text(f"{card.read_text()}{text}\n")
    assert found(ready) == [f"README.md:{lines + 1}: {said}"]


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/home/data/x and https://example.org/tmp/file",
        "llama_cpp 0.3.36, transformers 5.23.0, version 2026.10.11549, build 1.2.3.4567",
        "canada, adage, and std::vector at 10:28:55, ratio 16:9, 127.0.0.1, ::1",
        "mail me: ada.l@example.org",
    ],
)
def test_a_harmless_text_is_let_through(ready: Path, text: str) -> None:
    card = ready / "README.md"
    card.write_text(f"{card.read_text()}{text.replace('ada.l', 'grace')}\n")
    assert found(ready) == []


def test_the_figures_of_a_devices_address_are_no_names(model_cache: Path) -> None:
    add_device("kitchen", "ada@192.168.1.5")
    add_device("attic", "ada@attic.local")
    assert {*_own_hosts()} == {"kitchen", "ada", "ada@192.168.1.5", "attic", "local", "ada@attic.local"}


def test_it_is_found_in_json_by_its_key(ready: Path) -> None:
    path = ready / "bench.jsonl"
    row = json.loads(path.read_text())
    row["device"]["os"] = "Linux on tinker-box"
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    assert found(ready) == ["bench.jsonl:2.device.os: tinker-box"]


def test_it_is_found_in_the_metadata_of_a_gguf_file(ready: Path) -> None:
    path = ready / "tiny-Q8_0.gguf"
    rewrite(path, {"quantize.imatrix.file": Field(8, b"/home/grace/imatrix.dat")})
    with pytest.raises(InputError, match="checksum"):
        preview(ready, MACHINE)
    write_keys(ready)  # brings student.json up to date
    assert found(ready) == ["tiny-Q8_0.gguf:quantize.imatrix.file: /home/grace/imatrix.dat"]


def test_a_word_may_be_allowed_and_a_secret_never(ready: Path) -> None:
    card = ready / "README.md"
    card.write_text(card.read_text() + "by ada with hf_abcdefghijklmnopqrstu\n")
    for allow, left in (((), ["hf_abc…", "ada"]), (("ada", "hf_abcdefghijklmnopqrstu"), ["hf_abc…"])):
        assert [line.split(": ")[1] for line in found(ready, allow=allow)] == left


def test_a_file_with_other_bytes_and_a_missing_card_are_errors(ready: Path) -> None:
    path = ready / "tiny-Q8_0.gguf"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(InputError, match="checksum"):
        preview(ready, MACHINE)
    (ready / "README.md").unlink()
    with pytest.raises(InputError, match=r"no README\.md\n.*arte-edge card"):
        preview(ready, MACHINE)


def test_a_checkpoint_is_sent_with_its_card_and_looked_through(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"trained_in": "/home/grace/run"}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "/root/base"}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"ada": 1, "192.168.1.1": 2}}}))
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    shown = preview(tmp_path, MACHINE)
    assert {*shown.files} == {*["README.md", "config.json", "model.safetensors", "tokenizer.json"]}
    assert [name for name, _ in shown.excluded] == ["optimizer.pt"]
    assert [str(f) for f in shown.findings] == [
        "config.json:_name_or_path: a path: /root/base",
        "model.safetensors:__metadata__.trained_in: a path: /home/grace/run",
    ]


REPO = "ada/tiny-GGUF"
NAME = "tiny-Q8_0.gguf"


@pytest.fixture
def carded(export_folder: Path, capsys: Capture) -> Path:
    """An export as `arte-edge bench` and `arte-edge card` leave it."""
    lines = [speed_row("tg128", 20.5), speed_row("pp512", 150.0)]
    (export_folder / "bench.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in lines))
    assert main(["card", str(export_folder)]) == 0
    capsys.readouterr()
    return export_folder


def test_nothing_is_sent_without_yes(carded: Path, hub: Make, capsys: Capture) -> None:
    server = hub()
    assert main(["push", str(carded), "--to", REPO]) == 0
    out = capsys.readouterr().out
    assert server.requests == []
    for part in (REPO, NAME, "base_model: HuggingFaceTB/SmolLM2-135M-Instruct", "tiny-Q4_K_M.gguf.rejected: "):
        assert part in out


def test_with_yes_the_hub_has_what_the_preview_showed(carded: Path, hub: Make, capsys: Capture) -> None:
    server = hub()
    shown = cli_json(capsys, "push", str(carded), "--to", REPO, "--private", "--yes")
    assert set(server.files) == {file["file"] for file in shown["files"]}
    assert all(server.files[name] == (carded / name).read_bytes() for name in server.files)
    assert "tiny-Q4_K_M.gguf.rejected" not in server.files
    assert server.repos[REPO]["visibility"] == "private"
    assert shown["sent"]["url"].endswith(REPO)
    assert any("validate-yaml" in request for request in server.requests)  # the Hub judged the card


def test_a_push_cut_off_resumes_and_sends_large_files_once(carded: Path, hub: Make, capsys: Capture) -> None:
    server = hub()
    server.fail_uploads = 1
    assert main(["push", str(carded), "--to", REPO, "--yes"]) == 1
    assert server.commits == []
    for _ in range(2):
        assert main(["push", str(carded), "--to", REPO, "--yes"]) == 0
    puts = [request for request in server.requests if request.startswith("PUT")]
    assert len(puts) == 2  # the one that failed, and one
    assert server.files[NAME] == (carded / NAME).read_bytes()


def test_something_personal_stops_it_before_the_hub_is_asked(carded: Path, hub: Make, capsys: Capture) -> None:
    server = hub()
    card = carded / "README.md"
    card.write_text(card.read_text() + "on 192.168.7.9\n")
    assert main(["push", str(carded), "--to", REPO, "--yes"]) == 2
    error = capsys.readouterr().err
    assert "README.md:" in error and "192.168.7.9" in error and server.requests == []
    assert main(["push", str(carded), "--to", REPO, "--yes", "--allow", "192.168.7.9"]) == 0
    assert "README.md" in server.files


def test_no_message_or_file_has_a_token(carded: Path, hub: Make, capsys: Capture, monkeypatch: Patch) -> None:
    server = hub()
    token = "hf_" + "x" * 34
    card = carded / "README.md"
    before = card.read_text()
    card.write_text(f"{before}{token}\n")
    assert main(["push", str(carded), "--to", REPO, "--yes"]) == 2
    card.write_text(before)
    server.refuse = 403
    assert main(["push", str(carded), "--to", REPO, "--yes"]) == 2
    monkeypatch.setenv("HF_TOKEN", token.replace("x", "y"))
    server.refuse = 0
    assert main(["push", str(carded), "--to", REPO, "--yes"]) == 2
    printed = "".join(capsys.readouterr())
    assert "no write access" in printed and server.files == {}
    assert token not in printed and "yyyyyyyy" not in printed


def test_no_token_says_how_to_log_in(carded: Path, hub: Make, capsys: Capture, monkeypatch: Patch) -> None:
    server = hub()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(carded / "none"))
    assert main(["push", str(carded), "--to", REPO, "--yes"]) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert server.requests == []


def test_an_unreachable_hub_is_exit_code_1(carded: Path, hub: Make, capsys: Capture) -> None:
    server = hub()
    server.shutdown()
    server.server_close()
    assert main(["push", str(carded), "--to", REPO, "--yes"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_the_checkpoints_card_is_written_beside_it(carded: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    before = {path: path.read_bytes() for path in carded.iterdir()}
    assert main(["card", str(carded), "--checkpoint", str(folder)]) == 0
    assert "base_model_relation: finetune" in (folder / "README.md").read_text()
    assert {path: path.read_bytes() for path in carded.iterdir()} == before


def test_a_second_card_changes_nothing_and_a_dry_run_writes_nothing(carded: Path, capsys: Capture) -> None:
    assert cli_json(capsys, "card", str(carded))["changed"] == []
    (carded / "README.md").unlink()
    assert main(["card", str(carded), "--dry-run", "--base-model", "ada/tiny"]) == 0
    assert "base_model_relation: quantized" in capsys.readouterr().out
    assert not (carded / "README.md").exists()

import json
import struct
from pathlib import Path

import pytest
from tiny import speed_row

from arte_edge.errors import InputError
from arte_edge.gguf.reader import Field
from arte_edge.gguf.writer import rewrite
from arte_edge.pii_scan import Machine
from arte_edge.publish.card.card import write_card, write_keys
from arte_edge.publish.hub import preview
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

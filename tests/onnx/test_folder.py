"""ONNX folders are written atomically and without paths of this machine."""

from pathlib import Path

import pytest

from arte_edge.errors import ArteError
from arte_edge.onnx.folder import find_private_text, reject_private_text, staged
from arte_edge.pii_scan import this_machine


def fill(folder: Path, text: str = "new") -> None:
    (folder / "genai_config.json").write_text(text)


def test_a_folder_appears_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged(out) as folder:
        fill(folder)
        (folder.parent / "log.txt").write_text("not part of it")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["genai_config.json"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_after_an_error_the_earlier_export_is_unchanged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out) as folder:
        fill(folder, "old")
    with pytest.raises(RuntimeError), staged(out) as folder:
        fill(folder)
        raise RuntimeError
    assert (out / "genai_config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_export_are_removed(tmp_path: Path) -> None:
    for name in (".out.abc.partial", ".other.abc.partial"):
        (tmp_path / name / "whole").mkdir(parents=True)
    with staged(tmp_path / "out") as folder:
        fill(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.abc.partial", "out"]


def test_paths_of_this_machine_are_found_in_any_file(tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "work" / "whole", tmp_path / "my-student"
    out.mkdir(parents=True)
    (out / "clean.json").write_text('{"model": "my-student"}')
    (out / "empty.json").touch()
    (out / "model.onnx").write_bytes(bytes(5000) + str(checkpoint).encode() + bytes(5000))
    (out / "tokenizer.json").write_text(f'{{"home": "{Path.home()}/x"}}')
    texts = this_machine().private_paths(checkpoint)
    assert find_private_text(out, texts) == {
        "model.onnx": str(checkpoint),
        "tokenizer.json": next(text for text in texts if f"{Path.home()}/x".startswith(text)),
    }
    with pytest.raises(ArteError, match=r"model\.onnx"):
        reject_private_text(out, checkpoint, skip=["tokenizer.json"])
    (out / "model.onnx").unlink()
    reject_private_text(out, checkpoint, skip=["tokenizer.json"])

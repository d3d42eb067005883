"""ONNX folders are written atomically and without paths of this machine."""

from pathlib import Path

import pytest

from arte_edge.errors import ArteError
from arte_edge.onnx.folder import find_private_text, reject_private_text
from arte_edge.pii_scan import this_machine


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

"""ONNX folders are written atomically and without paths of this machine."""

from pathlib import Path

import pytest
import tiny

from arte_edge.errors import ArteError
from arte_edge.model_folder import chat_templates, tokenizer_files
from arte_edge.onnx.build import copy_tokenizer, find_private_text, reject_private_text
from arte_edge.pii_scan import this_machine


@pytest.mark.parametrize("as_key", [False, True])
def test_a_folder_of_either_layout_has_the_checkpoint_s_template_alone(as_key: bool, tmp_path: Path) -> None:
    checkpoint, folder = tmp_path / "student", tmp_path / "onnx"
    for path, text in ((checkpoint, "new"), (folder, "old")):
        tiny.write_tokenizer(path, template=text)
    if as_key:
        (checkpoint / "chat_template.jinja").unlink()
        tiny.change_json(checkpoint / "tokenizer_config.json", lambda config: config.update(chat_template="new"))
    copy_tokenizer(checkpoint, folder)
    assert chat_templates(tokenizer_files(folder)) == {"default": "new"}


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

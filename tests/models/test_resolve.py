"""References to what is on disk: every kind is told apart, everything unusable is named."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from tiny import Make, Patch

from arte_edge.cache import sha256_file
from arte_edge.errors import InputError
from arte_edge.models import LocalModel, resolve


def _checkpoint(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_gguf_is_named_after_its_file(model_cache: Path, make_gguf: Make) -> None:
    path = make_gguf("student.Q8_0.gguf")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert resolve(str(path)) == LocalModel("student.Q8_0", sha256, path, None, "Q8_0")


def test_a_folder_is_a_checkpoint_or_the_one_gguf_in_it(model_cache: Path, make_gguf: Make, tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "tuned", torch_dtype="float32")
    model = resolve(str(folder))
    assert (model.name, model.folder, model.gguf, model.quantization) == ("tuned", folder, None, "F32")
    assert model.checkpoint() == folder
    gguf = make_gguf()
    (tmp_path / "one").mkdir()
    gguf = gguf.rename(tmp_path / "one" / "x.gguf")
    assert resolve(str(tmp_path / "one")).gguf == gguf
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="an adapter, not a model"):
        resolve(str(folder))


def test_a_checkpoints_identity_is_its_weights_shape_and_tokens(model_cache: Path, tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "tuned", dtype="bfloat16")
    before = resolve(str(folder)).sha256
    (folder / "trainer_state.json").write_text("{}")
    assert resolve(str(folder)).sha256 == before
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept + b" ")
        assert resolve(str(folder)).sha256 != before, name
        (folder / name).write_bytes(kept)
    assert resolve(str(folder)).sha256 == before


@pytest.mark.parametrize("ref", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "nowhere.gguf"])
def test_a_path_that_is_not_there_is_never_taken_for_a_name(model_cache: Path, ref: str) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        resolve(ref)


def test_a_large_file_is_summed_once_until_it_changes(model_cache: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"a" * 5_000_000)
    first = sha256_file(path)
    reads: list[Path] = []
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (reads.append(self), opened(self, *a, **k))[1])
    assert sha256_file(path) == first and path not in reads
    state = path.stat()
    path.write_bytes(b"b" * 5_000_000)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # as if it had not been written to
    assert sha256_file(path) == hashlib.sha256(b"b" * 5_000_000).hexdigest() != first
    reads.clear()
    assert sha256_file(path) == sha256_file(path, since_boot=True) and path not in reads
    monkeypatch.setattr("arte_edge.cache.boot_id", lambda: "another start of the machine")
    assert sha256_file(path) and path not in reads
    assert sha256_file(path, since_boot=True) and path in reads


def test_a_broken_memory_of_sums_is_no_error(model_cache: Path, tmp_path: Path) -> None:
    (model_cache / "hashes.json").write_text("[1, 2")
    path = tmp_path / "large"
    path.write_bytes(b"a" * 5_000_000)
    assert sha256_file(path) == hashlib.sha256(b"a" * 5_000_000).hexdigest()

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from arte_edge.errors import InputError
from arte_edge.models.artifact import checksums_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARTE_EDGE_HOME", str(tmp_path / "home"))


def test_the_tensor_sum_of_a_gguf_is_over_its_tensors_in_order(make_gguf: Callable[..., Path]) -> None:
    gguf = pytest.importorskip("gguf")
    path = make_gguf()
    digest = hashlib.sha256()
    for tensor in gguf.GGUFReader(path).tensors:  # as gguf_hash.py of llama.cpp does
        digest.update(tensor.data)
    found = checksums_of(path)
    assert found.tensor_sha256 == digest.hexdigest()
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.size_bytes == path.stat().st_size > found.tensor_bytes > 0


def test_rewriting_the_metadata_leaves_the_tensor_sum(make_gguf: Callable[..., Path]) -> None:
    one, two = (
        checksums_of(make_gguf("a.gguf")),
        checksums_of(make_gguf("b.gguf", general__name="another name")),
    )
    assert one.tensor_sha256 == two.tensor_sha256 and one.sha256 != two.sha256


def test_one_changed_weight_changes_both(make_gguf: Callable[..., Path]) -> None:
    path = make_gguf()
    before = checksums_of(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    after = checksums_of(path)
    assert after.tensor_sha256 != before.tensor_sha256 and after.sha256 != before.sha256


def test_a_gguf_that_is_cut_short_is_refused(make_gguf: Callable[..., Path]) -> None:
    path = make_gguf()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError):
        checksums_of(path)


def onnx_folder(folder: Path, *, data: bytes | None = b"weights", config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "genai_config.json").write_text(config)
    if data is not None:
        (folder / "model.onnx.data").write_bytes(data)
    return folder


def test_the_tensor_sum_of_a_folder_is_over_its_external_data(tmp_path: Path) -> None:
    one = checksums_of(onnx_folder(tmp_path / "a"))
    two = checksums_of(onnx_folder(tmp_path / "b", config='{"x": 1}'))
    three = checksums_of(onnx_folder(tmp_path / "c", data=b"Weights"))
    assert one.tensor_sha256 == two.tensor_sha256 != three.tensor_sha256
    assert len({one.sha256, two.sha256, three.sha256}) == 3
    assert [part.file for part in one.parts] == ["genai_config.json", "model.onnx", "model.onnx.data"]
    assert one.size_bytes == sum(part.size_bytes for part in one.parts)


def test_a_model_without_external_data_is_its_own(tmp_path: Path) -> None:
    found = checksums_of(onnx_folder(tmp_path / "a", data=None))
    assert found.tensor_sha256 == hashlib.sha256(b"graph").hexdigest()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.onnx"):
        checksums_of(tmp_path)

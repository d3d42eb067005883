import hashlib
from pathlib import Path

import pytest
from tiny import Make, Patch

from arte_edge.errors import InputError
from arte_edge.gguf.reader import QUANT_TYPES
from arte_edge.models.artifact import Format, checksums_of, format_of, parse_list

NAMES = {
    "q4_k_m": Format("gguf", "Q4_K_M"),
    "Q4_K": Format("gguf", "Q4_K_M"),
    " f16 ": Format("gguf", "F16"),
    "int4": Format("onnx-genai", "int4"),
    "FP32": Format("onnx-genai", "fp32"),
    "optimum-fp32": Format("onnx-optimum", "fp32"),
    "optimum-int8": Format("onnx-optimum", "int8", "avx2"),
    "optimum-int8-arm64": Format("onnx-optimum", "int8", "arm64"),
}


def test_formats_are_named_in_any_case_and_by_their_label_and_share_no_file() -> None:
    assert {name: format_of(name) for name in NAMES} == NAMES
    formats = {*NAMES.values(), *(Format("gguf", name) for name in QUANT_TYPES)}
    assert {format_of(format.label) for format in formats} == formats
    assert len({format.file_name("m") for format in formats}) == len(formats)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        *[("Q4_KM", "Q4_K_M"), ("Q4_0_4_4", "Q4_0"), ("int3", ""), ("optimum", ""), ("optimum-int4", "")],
        *[("optimum-int8-sparc", "optimum-int8"), ("optimum-fp32-avx2", "optimum-fp32")],
    ],
)
def test_an_unknown_format_names_the_nearest_one(text: str, hint: str) -> None:
    with pytest.raises(InputError) as error:
        format_of(text)
    assert hint in error.value.hint


def test_lists_are_in_order_without_repetitions_and_not_empty() -> None:
    labels = [format.label for format in parse_list("Q8_0,q4_k_m,Q4_K", "int4,optimum-int8", "avx512")]
    assert labels == ["Q8_0", "Q4_K_M", "int4", "optimum-int8-avx512"]
    with pytest.raises(InputError, match="--gguf"):
        parse_list(" , ", None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("ARTE_EDGE_HOME", str(tmp_path / "home"))


def test_the_tensor_sum_of_a_gguf_is_over_its_tensors_in_order(make_gguf: Make) -> None:
    gguf = pytest.importorskip("gguf")
    path = make_gguf()
    digest = hashlib.sha256()
    for tensor in gguf.GGUFReader(path).tensors:  # as gguf_hash.py of llama.cpp does
        digest.update(tensor.data)
    found = checksums_of(path)
    assert found.tensor_sha256 == digest.hexdigest()
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.size_bytes == path.stat().st_size > found.tensor_bytes > 0


def test_metadata_leaves_the_tensor_sum_and_a_changed_weight_does_not(make_gguf: Make) -> None:
    path = make_gguf("a.gguf")
    one, two = checksums_of(path), checksums_of(make_gguf("b.gguf", general__name="another name"))
    assert one.tensor_sha256 == two.tensor_sha256 and one.sha256 != two.sha256
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    after = checksums_of(path)
    assert after.tensor_sha256 != one.tensor_sha256 and after.sha256 != one.sha256


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


def test_a_model_without_external_data_is_its_own_and_a_folder_without_one_rejected(tmp_path: Path) -> None:
    found = checksums_of(onnx_folder(tmp_path / "a", data=None))
    assert found.tensor_sha256 == hashlib.sha256(b"graph").hexdigest()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.onnx"):
        checksums_of(tmp_path / "empty")

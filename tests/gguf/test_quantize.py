"""Quantizing small random models with the real llama.cpp: what is written, what is reported, what is refused."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import Capture, Folders, Make, Patch

from arte_edge.errors import ArteError, InputError
from arte_edge.gguf.imatrix import Imatrix, write_imatrix
from arte_edge.gguf.quantize import quantize
from arte_edge.gguf.reader import QUANT_TYPES, read_header

N_LAYER, VOCAB, KV = 2, 64, 128


@pytest.fixture(scope="session")
def model(tmp_path_factory: Folders) -> Make:
    """Write a random F16 Llama: ``model(width, width_ff)``; rows of 256 and 512 fit every type."""

    @functools.cache
    def make(width: int = 256, width_ff: int = 512, n_layer: int = N_LAYER) -> Path:
        sizes = {"vocab_size": VOCAB, "context_length": 64, "embedding_length": width, "block_count": n_layer}
        heads = {"feed_forward_length": width_ff, "head_count": width // 32, "head_count_kv": KV // 32}
        path = tmp_path_factory.mktemp("quant") / f"{width}.gguf"
        writer = tiny.gguf_writer(path, name="Tiny", file_type=1, tokenizer_model="no_vocab", **sizes, **heads)
        return tiny.add_tensors(writer, shapes(width, width_ff, n_layer), scale=0.1)

    return make


def shapes(width: int = 256, width_ff: int = 512, n_layer: int = N_LAYER) -> dict[str, tuple[int, ...]]:
    return tiny.llama_shapes(VOCAB, width, width_ff, n_layer, KV)


@pytest.fixture
def matrix(tmp_path: Path) -> Make:
    """Write an importance matrix for `model(width, width_ff)` in which column 3 counts for almost all."""

    def make(*sizes: int, name: str = "matrix.gguf") -> Path:
        blocks = {n: s for n, s in shapes(*sizes).items() if n.startswith("blk.") and len(s) == 2}
        sums = {name: np.full(shape[1], 1e-3, np.float32) for name, shape in blocks.items()}
        for row in sums.values():
            row[3] = 1000.0
        return write_imatrix(Imatrix(sums, 10 * 512), tmp_path / name)

    return make


def weights(path: Path, name: str) -> np.ndarray:
    import gguf

    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    values: np.ndarray = gguf.dequantize(tensor.data, tensor.tensor_type)
    return values


def test_the_report_is_what_is_in_the_file(model: Make, tmp_path: Path) -> None:
    report = quantize(model(), tmp_path / "out.gguf", "q4_k_m")
    table = read_header(tmp_path / "out.gguf")
    assert report.type == "Q4_K_M" and report.fallbacks == () and report.warnings == ()
    assert report.size_bytes == (tmp_path / "out.gguf").stat().st_size
    assert report.tensor_types["Q4_K"] > 0 < report.tensor_types["Q6_K"] and report.tensor_types["F32"] == 5
    assert sum(report.tensor_types.values()) == len(table.tensors)
    stored = sum(tensor.size_bytes for tensor in table.tensors.values())
    n_value = sum(int(np.prod(shape)) for shape in shapes().values())
    assert report.bits_per_weight == pytest.approx(8 * stored / n_value)
    assert 4.5 < report.bits_per_weight < 6.6
    assert table.metadata["general.file_type"] == 15


# Quantizes to every type in one process: a process each would take a minute for their imports alone.
ONE_THREAD = os.environ | {"ARTE_EDGE_THREADS": "1"}
_EVERY_TYPE = """
import json, sys
from pathlib import Path
from arte_edge.gguf import quantize as module
from arte_edge.gguf.reader import QUANT_TYPES
source, matrix, out = map(Path, sys.argv[1:])
module._run = lambda job: module.call_llama_cpp(job)["log"]
for name, quant in QUANT_TYPES.items():
    report = module.quantize(source, out, name, imatrix=matrix if quant.needs_imatrix else None)
    print(json.dumps([name, report.tensor_types, report.fallbacks, report.bits_per_weight]))
"""


def test_every_type_that_is_offered_can_be_written(model: Make, matrix: Make, tmp_path: Path) -> None:
    paths = [str(path) for path in (model(256, 256, 1), matrix(256, 256, 1), tmp_path / "out.gguf")]
    command = [sys.executable, "-c", _EVERY_TYPE, *paths]
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert child.returncode == 0, child.stderr
    bits = {}
    for line in child.stdout.splitlines():
        name, types, fallbacks, bits[name] = json.loads(line)
        # A mixture of experts is what MXFP4_MOE is for; llama.cpp gives every other model Q8_0.
        assert {"MXFP4_MOE": "Q8_0"}.get(name, QUANT_TYPES[name].default) in types, line
        assert fallbacks == [], line
    assert list(bits) == list(QUANT_TYPES)
    assert bits["F32"] == 32 and bits["F16"] > bits["Q8_0"] > bits["Q5_K_M"] > bits["Q4_0"] > bits["IQ1_S"]


def test_a_type_that_needs_a_matrix_is_rejected_without_one(model: Make, tmp_path: Path) -> None:
    for name in (name for name, quant in QUANT_TYPES.items() if quant.needs_imatrix):
        with pytest.raises(InputError, match="needs an importance matrix"):
            quantize(model(), tmp_path / "out.gguf", name)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_256_does_not_divide_are_named_with_what_they_got(model: Make, tmp_path: Path) -> None:
    report = quantize(model(96, 256), tmp_path / "out.gguf", "Q4_K_M")
    found = dict(line.split(": ") for line in report.fallbacks)
    assert found["blk.0.attn_q.weight"] == "Q4_K -> Q5_0"
    assert found["token_embd.weight"] == "blocks of 256 -> Q8_0"
    assert "blk.1.ffn_down.weight" not in found  # its rows are 256 long
    table = read_header(tmp_path / "out.gguf").tensors
    assert all(table[name].type == text.split(" -> ")[1] for name, text in found.items())
    assert len(found) == 1 + 6 * N_LAYER
    assert report.bits_per_weight > 5.5  # far from the 4.5 of Q4_K


def test_rows_that_do_not_fit_fall_back_and_are_named(model: Make, tmp_path: Path) -> None:
    report = quantize(model(96, 256), tmp_path / "out.gguf", "Q4_0")
    assert report.fallbacks == ("token_embd.weight: Q6_K -> Q8_0",)
    report = quantize(model(96, 256), tmp_path / "out.gguf", "Q8_0", overrides={"attn_v": "Q6_K"})
    assert report.fallbacks == tuple(f"blk.{i}.attn_v.weight: Q6_K -> Q8_0" for i in range(N_LAYER))


def test_a_matrix_moves_the_rounding_to_other_columns(model: Make, matrix: Make, tmp_path: Path) -> None:
    for kind in ("Q4_0", "Q4_K_M"):
        quantize(model(), tmp_path / "plain.gguf", kind)
        quantize(model(), tmp_path / "weighted.gguf", kind, imatrix=matrix())
        name = "blk.1.attn_q.weight"
        exact = weights(model(), name).astype(np.float32)
        plain, weighted = (weights(tmp_path / f"{n}.gguf", name) - exact for n in ("plain", "weighted"))
        assert np.abs(weighted[:, 3]).mean() < 0.5 * np.abs(plain[:, 3]).mean()
        assert np.square(weighted).mean() > np.square(plain).mean()


def test_what_is_said_of_the_matrix_holds_no_path(model: Make, matrix: Make, tmp_path: Path) -> None:
    quantize(model(), tmp_path / "out.gguf", "Q4_K_M", imatrix=matrix())
    assert str(tmp_path).encode() not in (tmp_path / "out.gguf").read_bytes()
    metadata = read_header(tmp_path / "out.gguf").metadata
    said = {key: metadata[f"quantize.imatrix.{key}"] for key in ("file", "dataset", "entries_count")}
    assert said == {"file": "matrix.gguf", "dataset": "training prompts", "entries_count": 7 * N_LAYER}
    assert metadata["quantize.imatrix.chunks_count"] == 10


def test_overrides_reach_the_tensors_they_name(model: Make, tmp_path: Path) -> None:
    overrides = {"/blk\\.0\\.ffn_.*/": "Q8_0", "ffn_down": "q3_K", "blk.*.attn_v": "F16", "token_embd": "Q5_K"}
    quantize(model(), tmp_path / "out.gguf", "Q4_K_M", overrides=overrides)
    types = {name: tensor.type for name, tensor in read_header(tmp_path / "out.gguf").tensors.items()}
    assert types["blk.0.ffn_up.weight"] == types["blk.0.ffn_down.weight"] == "Q8_0"  # the first match decides
    assert types["blk.1.ffn_down.weight"] == "Q3_K" and types["blk.1.ffn_up.weight"] == "Q4_K"
    assert types["blk.0.attn_v.weight"] == types["blk.1.attn_v.weight"] == "F16"
    assert types["token_embd.weight"] == "Q5_K"


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("Q4_K_X", {}, "not a quantization"),
        ("Q4_K_M", {"atn_v": "Q8_0"}, "matches no matrix"),
        ("Q4_K_M", {"attn_v": "Q8_9"}, "not a tensor type"),
        ("Q4_K_M", {"/attn_(v/": "Q8_0"}, "not a regular expression"),
        ("Q4_K_M", {"token_embd": "IQ2_XXS"}, "needs an importance matrix"),  # llama.cpp would abort
        ("F16", {"attn_v": "Q8_0"}, "no effect"),
    ],
)
def test_a_wrong_request_is_rejected_before_anything_is_written(
    kind: str, overrides: dict[str, str], message: str, model: Make, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        quantize(model(), tmp_path / "out.gguf", kind, overrides=overrides)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_source_is_rejected(model: Make, tmp_path: Path) -> None:
    quantize(model(), tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(InputError, match="quantized already"):
        quantize(tmp_path / "q8.gguf", tmp_path / "out.gguf", "Q4_0")


def test_llama_cpp_s_own_reason_is_passed_on(model: Make, tmp_path: Path) -> None:
    with pytest.raises(ArteError, match="no tensor type fallback is defined for type q1_0"):
        quantize(model(96, 256), tmp_path / "out.gguf", "Q1_0")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file_and_no_other(model: Make, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"old")
    (tmp_path / ".out.gguf.1.partial").write_bytes(b"what a killed run left")
    bad = tmp_path / "bad.gguf"
    content = bytearray(model().read_bytes())
    content[-4096:] = b"\xff" * 4096  # not a number in F16 and F32
    bad.write_bytes(content)
    with pytest.raises(ArteError, match="cannot quantize"):
        quantize(bad, tmp_path / "out.gguf", "Q4_0")
    assert (tmp_path / "out.gguf").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf", "out.gguf"]


def test_the_number_of_threads_does_not_change_a_byte(
    model: Make, matrix: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    for threads in ("1", "2"):
        monkeypatch.setenv("ARTE_EDGE_THREADS", threads)
        quantize(model(), tmp_path / f"{threads}.gguf", "Q4_K_M", imatrix=matrix())
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_q4_0_of_a_small_model_has_a_warning_and_nothing_is_printed(
    model: Make, tmp_path: Path, capfd: Capture
) -> None:
    (warning,) = quantize(model(), tmp_path / "out.gguf", "Q4_0").warnings
    assert "Q4_0" in warning and "%" in warning
    quantize(model(96, 256), tmp_path / "out.gguf", "Q4_K_M")
    assert capfd.readouterr() == ("", "")

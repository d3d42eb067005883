"""Sizes of models, read from the headers of files made here, against what is in them."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import Make

from arte_edge.device.model_size import ModelShape, read_onnx_sizes
from arte_edge.errors import InputError
from arte_edge.gguf.reader import read_model_header
from arte_edge.models import LocalModel

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def write_safetensors(folder: Path, tensors: dict[str, tuple[str, int]], **config: object) -> Path:
    """Write a checkpoint of zeros: name -> (type, bytes)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": [size // 2], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


@pytest.mark.parametrize(("tied", "token_bytes"), [(True, 600), (False, 1200 - 200)])
def test_an_embedding_is_read_whole_only_where_it_is_the_output_head(
    tmp_path: Path, tied: bool, token_bytes: int
) -> None:
    tensors = {"model.embed_tokens.weight": ("BF16", 200), "model.layers.0.mlp.up_proj.weight": ("BF16", 400)}
    if not tied:
        tensors["lm_head.weight"] = ("F32", 600)
    shape = ModelShape.of(write_safetensors(tmp_path / "model", tensors))
    assert shape.token_bytes == token_bytes == sum(shape.token_bytes_by_type.values())
    assert shape.weight_bytes == sum(size for _, size in tensors.values())
    assert (shape.format, shape.architecture, shape.n_layer, shape.n_ff) == ("safetensors", "llama", 2, 96)
    assert shape.kv_bytes(10) == 10 * 2 * 2 * 2 * 16 * 2  # tokens, keys and values, layers, heads, size, f16


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_a_gguf_gives_its_bytes_by_type(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    import numpy as np

    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_vocab_size(100)
    of_type = gguf.GGMLQuantizationType[kind]
    row_bytes = int(gguf.quant_shape_to_byte_shape((256,), of_type)[0])
    writer.add_tensor("token_embd.weight", np.zeros((100, 256), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((512, row_bytes), np.uint8), raw_dtype=of_type)
    tiny.finish(writer)
    shape = ModelShape.of(path)
    assert (shape.n_layer, shape.n_embd, shape.n_ff, shape.n_vocab) == (1, 256, 512, 100)
    assert shape.weight_bytes == shape.token_bytes  # tied
    assert shape.n_params == read_model_header(path).parameter_count == 612 * 256
    assert shape.token_bytes_by_type == {"F32": 100 * 256 * 4, kind: 512 * row_bytes}
    assert path.stat().st_size - shape.weight_bytes < 10_000


def test_an_untied_gguf_reads_one_row_of_its_embedding(make_gguf: Make) -> None:
    pytest.importorskip("gguf")
    import gguf
    import numpy as np

    path = make_gguf("untied.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv([2])
    writer.add_uint32("llama.expert_count", 8)
    writer.add_uint32("llama.expert_used_count", 2)
    for name, rows in (("token_embd.weight", 100), ("output.weight", 100), ("blk.0.ffn_up_exps.weight", 80)):
        writer.add_tensor(name, np.zeros((rows, 64), np.float16))
    tiny.finish(writer)
    shape = ModelShape.of(path)
    row = 64 * 2
    assert shape.weight_bytes == 280 * row
    assert shape.token_bytes == (1 + 100 + 80 * 2 // 8) * row
    assert shape.kv_values == 2 * (16 + 16)


def test_an_onnx_graph_is_measured_without_the_onnx_package(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    import numpy as np

    def weights(name: str, rows: int, dtype: type) -> Any:
        return onnx.numpy_helper.from_array(np.zeros((rows, 64), dtype), name)

    nodes = [
        onnx.helper.make_node("Gather", ["embed", "ids"], ["x"]),
        onnx.helper.make_node("MatMul", ["x", "up"], ["y"]),
        onnx.helper.make_node("GatherND", ["both", "ids"], ["z"]),
        onnx.helper.make_node("MatMul", ["y", "both"], ["logits"]),
    ]
    tensors = [
        weights("embed", 100, np.float32),
        weights("up", 30, np.float16),
        weights("both", 20, np.uint8),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializer=tensors)
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), str(path))
    sizes = read_onnx_sizes(path)
    assert sizes.weight_bytes == 64 * (100 * 4 + 30 * 2 + 20)
    assert sizes.lookup_bytes == 64 * 100 * 4  # what is looked up and multiplied is read whole
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shape = ModelShape.of(tmp_path)
    assert (shape.format, shape.token_bytes) == ("onnx", sizes.weight_bytes - sizes.lookup_bytes)
    (tmp_path / "genai_config.json").write_text(
        json.dumps(
            {
                "model": {
                    "type": "llama",
                    "vocab_size": 100,
                    "context_length": 512,
                    "decoder": {
                        "filename": "model.onnx",
                        "head_size": 16,
                        "hidden_size": 64,
                        "num_attention_heads": 4,
                        "num_hidden_layers": 2,
                        "num_key_value_heads": 2,
                    },
                }
            }
        )
    )
    assert ModelShape.of(tmp_path).format == "onnx-genai"
    assert ModelShape.of(tmp_path).kv_values == 2 * 2 * 16 * 2


@pytest.mark.parametrize("cut", [1, 7, 40, 200])
def test_a_file_that_is_cut_or_is_no_model_is_an_error_and_not_a_guess(
    tmp_path: Path, make_gguf: Make, cut: int
) -> None:
    folder = write_safetensors(tmp_path / "model", {"a": ("F16", 8)})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: min(cut, 60)])
    with pytest.raises(InputError):
        ModelShape.of(folder)
    gguf = make_gguf("a.gguf")
    gguf.write_bytes(gguf.read_bytes()[:cut])
    with pytest.raises(InputError):
        ModelShape.of(gguf)
    graph = tmp_path / "onnx" / "model.onnx"
    graph.parent.mkdir()
    graph.write_bytes(b"\x3a\xff\xff\xff\x0f" + bytes(cut))
    with pytest.raises(InputError):
        read_onnx_sizes(graph)
    with pytest.raises(InputError, match="no such file"):
        ModelShape.of(tmp_path / "nothing")


@pytest.mark.model
def test_smollm2_is_what_its_card_says(smollm2: LocalModel) -> None:
    assert smollm2.gguf is not None
    shape = ModelShape.of(smollm2.gguf)
    assert (shape.n_params, shape.n_layer, shape.n_embd, shape.n_ff) == (134_515_008, 30, 576, 1536)
    assert (shape.n_kv_head, shape.head_dim, shape.n_vocab, shape.n_ctx_train) == (3, 64, 49152, 8192)
    assert shape.token_bytes == shape.weight_bytes  # its embedding is tied

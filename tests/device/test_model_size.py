"""Sizes of models, read from the headers of files made here, against what is in them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from tiny import Make, write_safetensors

from arte_edge.device.memory_estimate import fit
from arte_edge.device.model_size import ModelSize, read_onnx_sizes
from arte_edge.errors import InputError
from arte_edge.gguf.reader import read_model_header
from arte_edge.models import LocalModel

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512}


@pytest.mark.parametrize(("tied", "token_bytes"), [(True, 600), (False, 1200 - 200)])
def test_only_an_output_head_is_read_whole(tmp_path: Path, tied: bool, token_bytes: int) -> None:
    tensors = {"model.embed_tokens.weight": ("BF16", [100]), "model.layers.0.mlp.up_proj.weight": ("BF16", [200])}
    if not tied:
        tensors["lm_head.weight"] = ("F32", [150])
    shape = ModelSize.of(write_safetensors(tmp_path / "model", tensors, **CONFIG))
    assert shape.token_bytes == token_bytes == sum(shape.token_bytes_by_type.values())
    assert shape.weight_bytes == 600 + 600 * (not tied)
    assert (shape.format, shape.architecture, shape.n_layer, shape.n_ff) == ("safetensors", "llama", 2, 96)
    assert shape.kv_bytes(10) == 10 * 2 * 2 * 2 * 16 * 2  # tokens, keys and values, layers, heads, size, f16


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_a_gguf_gives_its_bytes_by_type(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.gguf"
    sizes = {"block_count": 1, "embedding_length": 256, "feed_forward_length": 512, "vocab_size": 100}
    writer = tiny.gguf_writer(path, head_count=4, **sizes)
    of_type = gguf.GGMLQuantizationType[kind]
    row_bytes = int(gguf.quant_shape_to_byte_shape((256,), of_type)[0])
    writer.add_tensor("token_embd.weight", np.zeros((100, 256), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((512, row_bytes), np.uint8), raw_dtype=of_type)
    tiny.finish(writer)
    shape = ModelSize.of(path)
    assert (shape.n_layer, shape.n_embd, shape.n_ff, shape.n_vocab) == (1, 256, 512, 100)
    assert shape.weight_bytes == shape.token_bytes  # tied
    assert shape.n_params == read_model_header(path).parameter_count == 612 * 256
    assert shape.token_bytes_by_type == {"F32": 100 * 256 * 4, kind: 512 * row_bytes}
    assert path.stat().st_size - shape.weight_bytes < 10_000


def test_an_untied_gguf_reads_one_row_of_its_embedding(tmp_path: Path) -> None:
    path = tmp_path / "untied.gguf"
    experts = {"expert_count": 8, "expert_used_count": 2}
    writer = tiny.gguf_writer(path, block_count=1, embedding_length=64, head_count=4, head_count_kv=[2], **experts)
    for name, rows in (("token_embd.weight", 100), ("output.weight", 100), ("blk.0.ffn_up_exps.weight", 80)):
        writer.add_tensor(name, np.zeros((rows, 64), np.float16))
    tiny.finish(writer)
    shape = ModelSize.of(path)
    row = 64 * 2
    assert shape.weight_bytes == 280 * row
    assert shape.token_bytes == (1 + 100 + 80 * 2 // 8) * row
    assert shape.kv_values == 2 * (16 + 16)


def test_an_onnx_graph_is_measured_without_the_onnx_package(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")

    def weights(name: str, rows: int, dtype: type) -> Any:
        return onnx.numpy_helper.from_array(np.zeros((rows, 64), dtype), name)

    rows = ("Gather embed ids x", "MatMul x up y", "GatherND both ids z", "MatMul y both logits")
    nodes = [onnx.helper.make_node(kind, [a, b], [out]) for kind, a, b, out in map(str.split, rows)]
    sizes = (("embed", 100, np.float32), ("up", 30, np.float16), ("both", 20, np.uint8))
    tensors = [weights(*row) for row in sizes]
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializer=tensors)
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), str(path))
    sizes = read_onnx_sizes(path)
    assert sizes.weight_bytes == 64 * (100 * 4 + 30 * 2 + 20)
    assert sizes.lookup_bytes == 64 * 100 * 4  # what is looked up and multiplied is read whole
    assert sizes.folded_bytes == 0
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shape = ModelSize.of(tmp_path)
    assert (shape.format, shape.token_bytes) == ("onnx", sizes.weight_bytes - sizes.lookup_bytes)
    heads = {"head_size": 16, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    decoder = heads | {"filename": "model.onnx", "num_hidden_layers": 2}
    model = {"type": "llama", "vocab_size": 100, "context_length": 512, "decoder": decoder}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": model}))
    assert ModelSize.of(tmp_path).format == "onnx-genai"
    # A head whose transpose is the embedding, as in a tied fp32 graph: onnxruntime computes and keeps the transpose.
    graph.node.extend([onnx.helper.make_node("Transpose", [name], [name + "_t"]) for name in ("up", "alone")])
    graph.initializer.append(weights("alone", 10, np.float32))
    onnx.save(onnx.helper.make_model(graph), str(path))
    tied = ModelSize.of(tmp_path)
    assert (tied.weight_bytes, tied.folded_bytes) == (sizes.weight_bytes + 64 * 10 * 4, 64 * 30 * 2)
    assert fit(tied, 1 << 40, 8).weight_bytes == tied.weight_bytes + tied.folded_bytes
    assert ModelSize.of(tmp_path).kv_values == 2 * 2 * 16 * 2


@pytest.mark.parametrize("cut", [1, 7, 40, 200])
def test_a_file_cut_short_is_an_error_and_not_a_guess(tmp_path: Path, make_gguf: Make, cut: int) -> None:
    folder = write_safetensors(tmp_path / "model", {"a": ("F16", [4])}, **CONFIG)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: min(cut, 60)])
    with pytest.raises(InputError):
        ModelSize.of(folder)
    gguf = make_gguf("a.gguf")
    gguf.write_bytes(gguf.read_bytes()[:cut])
    with pytest.raises(InputError):
        ModelSize.of(gguf)
    graph = tmp_path / "onnx" / "model.onnx"
    graph.parent.mkdir()
    graph.write_bytes(b"\x3a\xff\xff\xff\x0f" + bytes(cut))
    with pytest.raises(InputError):
        read_onnx_sizes(graph)
    with pytest.raises(InputError, match="no such file"):
        ModelSize.of(tmp_path / "nothing")


@pytest.mark.model
def test_smollm2_is_what_its_card_says(smollm2: LocalModel) -> None:
    shape = ModelSize.of(smollm2.gguf)
    assert (shape.n_params, shape.n_layer, shape.n_embd, shape.n_ff) == (134_515_008, 30, 576, 1536)
    assert (shape.n_kv_head, shape.head_dim, shape.n_vocab, shape.n_ctx_train) == (3, 64, 49152, 8192)
    assert shape.token_bytes == shape.weight_bytes  # its embedding is tied

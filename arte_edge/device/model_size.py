"""The format and the sizes of a model, which determine whether it fits and how fast it decodes, from headers alone.

A generated token reads every weight once, with two exceptions: of an embedding that is not also the
output head only one row is read, and of the experts of a mixture only the selected ones. It also reads the
keys and values of all tokens before it.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from arte_edge.errors import InputError, reading
from arte_edge.files import read_json
from arte_edge.model_folder import look
from arte_edge.protobuf import fields, varint

ModelFormat = Literal["gguf", "onnx-genai", "onnx", "safetensors"]

_GRAPH = 7  # of ModelProto
_NODE, _INITIALIZER = 1, 5  # of GraphProto
_NODE_INPUT, _NODE_OP = 1, 4
_DIMS, _DATA_TYPE, _NAME = 1, 2, 8  # of TensorProto
# TensorProto.DataType -> bits of one value
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}


def model_format(path: Path) -> ModelFormat:
    """Return the format of the model at `path`. Raises InputError if there is none."""
    if path.is_file():
        return "gguf"
    if (path / "genai_config.json").is_file():
        return "onnx-genai"
    if any(path.glob("*.onnx")) or any(path.glob("onnx/*.onnx")):
        return "onnx"
    hint = "Give a .gguf file, a folder with an ONNX model, or a checkpoint folder."
    if not path.exists():
        raise InputError(f"{path}: no such file or folder", hint)
    if (found := look(path)).kind == "checkpoint":
        return "safetensors"
    what = "a GGUF file" if found.kind == "gguf" else "an adapter"
    raise InputError(f"{path}: holds {what}, {found.weights[0].name}, not a model folder", hint)


@dataclass(frozen=True)
class OnnxSizes:
    """Bytes of the initializers; of those read one row at a time (an embedding); of those that are held twice.

    onnxruntime computes the transpose of a weight when it loads the graph, and keeps the weight too if another
    node reads it: an fp32 embedding that is the output head as well.
    """

    weight_bytes: int
    lookup_bytes: int
    folded_bytes: int


def read_onnx_sizes(path: Path) -> OnnxSizes:
    """Return the sizes of a graph's weights, whether inside or outside the file. Raises InputError if unreadable."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _graph_sizes(data)
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not readable as ONNX: {error}", "Export it again.") from error


def _graph_sizes(data: mmap.mmap) -> OnnxSizes:
    counts: dict[str, int] = {}  # name -> bytes
    looked_up: set[str] = set()
    multiplied: set[str] = set()
    transposed: set[str] = set()
    graphs = [(start, end) for number, start, end in fields(data, 0, len(data)) if number == _GRAPH]
    for kind, at, stop in (part for start, end in graphs for part in fields(data, start, end)):
        if kind == _INITIALIZER:
            name, size_bytes = _tensor(data, at, stop)
            counts[name] = size_bytes
        elif kind == _NODE:
            inputs, op = _node(data, at, stop)
            reads = looked_up if op.startswith("Gather") else transposed if op == "Transpose" else multiplied
            reads.update(inputs)
    if not counts:
        raise ValueError("it contains no weights")
    lookup = looked_up - multiplied - transposed
    folded = transposed & (looked_up | multiplied)
    lookup_bytes, folded_bytes = (sum(counts.get(name, 0) for name in names) for names in (lookup, folded))
    return OnnxSizes(sum(counts.values()), lookup_bytes, folded_bytes)


def _tensor(data: mmap.mmap, at: int, end: int) -> tuple[str, int]:
    """Return an initializer's name and size in bytes."""
    name, bits, values = "", 32, 1
    for number, start, stop in fields(data, at, end):
        if number == _DIMS:  # one varint each, or several packed
            while start < stop:
                size, start = varint(data, start)
                values *= size
        elif number == _DATA_TYPE:
            bits = _BITS.get(varint(data, start)[0], 32)
        elif number == _NAME:
            name = data[start:stop].decode(errors="replace")
    return name, values * bits // 8


def _node(data: mmap.mmap, at: int, end: int) -> tuple[list[str], str]:
    """Return a node's input names and its operator."""
    inputs, op = [], ""
    for number, start, stop in fields(data, at, end):
        if number == _NODE_INPUT:
            inputs.append(data[start:stop].decode(errors="replace"))
        elif number == _NODE_OP:
            op = data[start:stop].decode(errors="replace")
    return inputs, op


_KV_VALUE_BYTES = 2  # f16, the default of the runtimes
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_WIDE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True)
class ModelSize:
    """Sizes of one model file or folder. Bytes are of the weights as stored."""

    name: str
    format: ModelFormat
    architecture: str
    quantization: str
    weight_bytes: int
    token_bytes: int  # of weights, read to generate one token
    n_params: int
    n_layer: int
    n_kv_head: int  # the largest of all layers
    head_dim: int
    n_embd: int
    n_ff: int  # the largest of all layers
    n_vocab: int
    n_ctx_train: int
    kv_values: int  # keys and values of one token in the cache, summed over all layers
    token_bytes_by_type: dict[str, int] = field(default_factory=dict)  # sums to `token_bytes`
    kv_value_bytes: int = _KV_VALUE_BYTES
    folded_bytes: int = 0  # of ONNX weights that onnxruntime holds a second time, see `OnnxSizes`

    @classmethod
    def of(cls, path: Path) -> ModelSize:
        """Return the sizes of a GGUF file, or a folder with ONNX or safetensors weights; InputError: it is neither."""
        readers = {"gguf": _of_gguf, "onnx-genai": _of_genai, "onnx": _of_onnx, "safetensors": _of_safetensors}
        read = readers[model_format(path)]
        with reading(path, "Is it a language model? Then fetch or export it again."):
            return read(path)

    def kv_bytes(self, tokens: int) -> int:
        """Return the bytes of the keys and values of `tokens` tokens.

        This is an upper bound: layers with a sliding window, which store fewer, are counted in full.
        """
        return tokens * self.kv_values * self.kv_value_bytes


def _of_gguf(path: Path) -> ModelSize:
    from arte_edge.gguf.reader import read_model_header

    header = read_model_header(path)
    arch = header.architecture

    def numbers(key: str) -> list[int]:
        """Return a number, or one per layer, as a list; empty if the file does not have it."""
        value = header.metadata.get(f"{arch}.{key}")
        values = value if isinstance(value, list | tuple) else [value]
        return [int(item) for item in values if isinstance(item, int)]

    def number(key: str) -> int:
        return (numbers(key) or [0])[0]

    is_tied = "output.weight" not in header.tensors
    experts = max(1, number("expert_count"))
    used = number("expert_used_count") or experts
    by_type: dict[str, int] = {}
    for name, tensor in header.tensors.items():
        if name in _EMBEDDINGS and not (is_tied and name == _EMBEDDINGS[0]):
            size_bytes = tensor.size_bytes // max(1, tensor.shape[0])
        elif "_exps." in name:
            size_bytes = tensor.size_bytes * used // experts
        else:
            size_bytes = tensor.size_bytes
        by_type[tensor.type] = by_type.get(tensor.type, 0) + size_bytes
    n_layer, n_embd = number("block_count"), number("embedding_length")
    n_head = max(numbers("attention.head_count") or [1])
    kv_heads = numbers("attention.head_count_kv") or [n_head]
    key_dim = number("attention.key_length") or n_embd // max(1, n_head)
    value_dim = number("attention.value_length") or key_dim
    heads = sum(kv_heads) if len(kv_heads) > 1 else kv_heads[0] * n_layer
    embedding = header.tensors.get(_EMBEDDINGS[0])
    return ModelSize(
        name=path.name,
        format="gguf",
        architecture=arch,
        quantization=header.quantization,
        weight_bytes=sum(tensor.size_bytes for tensor in header.tensors.values()),
        token_bytes=sum(by_type.values()),
        n_params=header.parameter_count,
        n_layer=n_layer,
        n_kv_head=max(kv_heads),
        head_dim=key_dim,
        n_embd=n_embd,
        n_ff=max(numbers("feed_forward_length") or [0]),
        n_vocab=embedding.shape[0] if embedding else number("vocab_size"),
        n_ctx_train=header.context_tokens,
        kv_values=heads * (key_dim + value_dim),
        token_bytes_by_type=by_type,
    )


def _attention(config: dict[str, Any], source: Path) -> dict[str, int]:
    """Return the sizes in a ``config.json`` of transformers, or in the text part of a multimodal one."""
    config = config.get("text_config") or config
    with reading(source, "Is it a language model's?"):
        n_layer, n_embd = int(config["num_hidden_layers"]), int(config["hidden_size"])
        n_head = int(config["num_attention_heads"])
        n_kv_head = int(config.get("num_key_value_heads") or n_head)
        head_dim = int(config.get("head_dim") or config.get("head_size") or n_embd // n_head)
        n_ff, n_vocab = int(config.get("intermediate_size") or 0), int(config.get("vocab_size") or 0)
        n_ctx_train = int(config.get("max_position_embeddings") or 0)
    return {
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_ff": n_ff,
        "n_kv_head": n_kv_head,
        "head_dim": head_dim,
        "kv_values": n_layer * n_kv_head * head_dim * 2,
        "n_vocab": n_vocab,
        "n_ctx_train": n_ctx_train,
    }


def _of_safetensors(folder: Path) -> ModelSize:
    from arte_edge.checkpoint import read_header

    config = read_json(folder / "config.json", required=True)
    by_type: dict[str, int] = {}
    weight_bytes = n_params = lookup_bytes = 0
    tensors = {name: info for file in look(folder).weights for name, info in read_header(file)[0].items()}
    has_head = "lm_head.weight" in tensors and not config.get("tie_word_embeddings", False)
    for name, info in tensors.items():
        start, end = map(int, info["data_offsets"])
        weight_bytes += end - start
        n_params += (end - start) // _WIDE.get(info["dtype"], 1)
        if name.endswith("embed_tokens.weight") and has_head:
            lookup_bytes += end - start
        else:
            by_type[info["dtype"]] = by_type.get(info["dtype"], 0) + end - start
    return ModelSize(
        name=folder.name,
        format="safetensors",
        architecture=str(config.get("model_type", "")),
        quantization=max(by_type, key=lambda kind: by_type[kind]) if by_type else "",
        weight_bytes=weight_bytes,
        token_bytes=weight_bytes - lookup_bytes,
        n_params=n_params,
        token_bytes_by_type=by_type,
        **_attention(config, folder / "config.json"),
    )


def _of_genai(folder: Path) -> ModelSize:
    source = folder / "genai_config.json"
    with reading(source, "Export it again."):
        model = dict(read_json(source, required=True)["model"])
        decoder = dict(model["decoder"])
        path = folder / decoder.get("filename", "model.onnx")
    sizes = read_onnx_sizes(path)
    config = {**decoder, "vocab_size": model.get("vocab_size"), "head_dim": decoder.get("head_size")}
    config["max_position_embeddings"] = model.get("context_length")
    parent = read_json(folder / "config.json")
    architecture = str(model.get("type") or parent.get("model_type", ""))
    return _onnx_size(folder, "onnx-genai", architecture, sizes, _attention(config, source))


def _of_onnx(folder: Path) -> ModelSize:
    config = read_json(folder / "config.json", required=True)
    sizes = max(map(read_onnx_sizes, folder.rglob("*.onnx")), key=lambda sizes: sizes.weight_bytes)
    shared = _attention(config, folder / "config.json")
    return _onnx_size(folder, "onnx", str(config.get("model_type", "")), sizes, shared)


def _onnx_size(
    folder: Path, kind: ModelFormat, architecture: str, sizes: OnnxSizes, shared: dict[str, int]
) -> ModelSize:
    token_bytes = sizes.weight_bytes - sizes.lookup_bytes
    return ModelSize(
        name=folder.name,
        format=kind,
        architecture=architecture,
        quantization="",
        weight_bytes=sizes.weight_bytes,
        token_bytes=token_bytes,
        n_params=0,  # unknown for packed 4-bit weights
        token_bytes_by_type={"onnx": token_bytes},
        folded_bytes=sizes.folded_bytes,
        kv_value_bytes=4,  # the shipped recipes keep the cache in fp32, in which ONNX computes on a CPU
        **shared,
    )

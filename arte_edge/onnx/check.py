"""Check the files of an exported ONNX folder: complete, valid, and with the names that runtimes expect.

Graphs are read with the `onnx` library and without their weights, so that files of any size are checked in
seconds. What the model computes is checked by `arte_edge.verify`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from arte_edge.errors import ArteError, InputError
from arte_edge.files import read_json
from arte_edge.onnx.build import copy_tokenizer, reject_private_text
from arte_edge.onnx.files import GENAI, end_tokens, read_genai_config, read_number

Shape = tuple[int | str, ...]
# Writers may pad the file after the last tensor to a page.
_PADDING_BYTES = 65_536


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor stored in another file. `need_bytes` is computed from its shape and type."""

    name: str
    location: str
    offset: int
    length: int
    need_bytes: int


@dataclass(frozen=True)
class Graph:
    """The interface of an ONNX model. A dimension is a number, or a name if it varies."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    externals: tuple[ExternalTensor, ...]


def read_graph(path: Path) -> Graph:
    """Read the model in `path` without its weights.

    Raises InputError: the file cannot be parsed.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is not a public class
        raise InputError(f"{path} is not a readable ONNX file: {error}", "Export or copy it again.") from error
    initialized = {tensor.name for tensor in model.graph.initializer}
    return Graph(
        inputs={value.name: _shape(value) for value in model.graph.input if value.name not in initialized},
        outputs={value.name: _shape(value) for value in model.graph.output},
        externals=tuple(
            _external(tensor) for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL
        ),
    )


def _shape(value: Any) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims)


def _external(tensor: Any) -> ExternalTensor:
    import onnx

    entries = {entry.key: entry.value for entry in tensor.external_data}
    four_bits = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    count = math.prod(tensor.dims)
    item_bytes = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    need = (count + 1) // 2 if tensor.data_type in four_bits else count * item_bytes
    offset = int(entries.get("offset", 0))
    return ExternalTensor(tensor.name, entries.get("location", ""), offset, int(entries.get("length", need)), need)


def external_problems(path: Path, graph: Graph) -> list[str]:
    """Return the problems of the files with the tensors of the model in `path`.

    Each must be beside the model, contain every tensor completely, and end after the last one.
    """
    problems: list[str] = []
    ends: dict[str, int] = {}
    for tensor in graph.externals:
        plain = PurePosixPath(tensor.location)
        if not tensor.location or plain.is_absolute() or plain.name != tensor.location:
            problems.append(f"{path.name}: {tensor.name} is in '{tensor.location}', which is not a plain file name")
        elif tensor.length != tensor.need_bytes:
            problems.append(
                f"{path.name}: {tensor.name} has {tensor.length} bytes in {tensor.location}, "
                f"its shape needs {tensor.need_bytes}"
            )
        else:
            ends[tensor.location] = max(ends.get(tensor.location, 0), tensor.offset + tensor.length)
    for name, end in sorted(ends.items()):
        file = path.with_name(name)
        if not file.is_file():
            problems.append(f"{name}, which contains tensors of {path.name}, is missing")
        elif not end <= file.stat().st_size <= end + _PADDING_BYTES:
            problems.append(f"{name} has {file.stat().st_size} bytes, the tensors in it end at {end}")
    return problems


# Inputs that a decoder of either layout may have besides its cache.
_PLAIN_INPUTS = {"input_ids", "attention_mask", "position_ids"}


def model_file(folder: Path) -> Path:
    """Return the ONNX file of an exported folder: named in genai_config.json, or the only one in ``onnx/``.

    Raises InputError: there is none, or more than one.
    """
    if (folder / GENAI).is_file():
        return folder / read_genai_config(folder)[0].decoder.filename
    below = folder / "onnx" if (folder / "onnx").is_dir() else folder
    found = sorted(below.glob("*.onnx"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"{folder} must contain one ONNX model; found: {names}", "Give a folder written by export.")
    return found[0]


def finish(checkpoint: Path, folder: Path) -> None:
    """Give an exported folder the tokenizer of its checkpoint; raise `ArteError` with all problems that it has."""
    tokenizer = copy_tokenizer(checkpoint, folder)
    if problems := folder_problems(folder, checkpoint):
        raise ArteError(
            "The ONNX export is invalid:\n" + "\n".join(f"  {problem}" for problem in problems),
            "Nothing was written. Please report this with the versions of onnxruntime and its exporter.",
        )
    reject_private_text(folder, checkpoint, skip=tokenizer)


def folder_problems(folder: Path, checkpoint: Path | None = None) -> list[str]:
    """Return the problems of an exported folder of either layout.

    Args:
        checkpoint: its source; without it stop tokens are not compared.
    """
    is_genai = (folder / GENAI).is_file()
    try:
        path = model_file(folder)
        if not path.is_file():
            return [f"{path.name} is missing"]
        graph = read_graph(path)
        problems = external_problems(path, graph)
        if not problems:  # the checker would name only the first of them
            problems += _checker(path)
        problems += [f"{name} is left over" for name in _unused_files(path, graph)]
        problems += (genai_problems if is_genai else optimum_problems)(folder, graph, checkpoint)
    except ArteError as error:
        return [error.message]
    if not (folder / "tokenizer.json").is_file():
        problems.append("tokenizer.json is missing")
    return problems


def _checker(path: Path) -> list[str]:
    """Run ONNX's own checker, by path, so that it checks external data too."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # ValidationError is not public in every release
        return [f"onnx.checker: {str(error).strip().splitlines()[0]}"]
    return []


def _unused_files(path: Path, graph: Graph) -> list[str]:
    """Return the names of weight files beside the model without a tensor of it."""
    used = {tensor.location for tensor in graph.externals}
    return [file.name for file in sorted(path.parent.glob(f"{path.name}?*")) if file.name not in used]


def genai_problems(folder: Path, graph: Graph, checkpoint: Path | None) -> list[str]:
    """Return contradictions between genai_config.json, the graph and the checkpoint."""
    model, _ = read_genai_config(folder)
    decoder, layers = model.decoder, model.decoder.num_hidden_layers
    problems = _names("inputs", list(decoder.inputs.expanded(layers)), graph.inputs)
    problems += _names("outputs", list(decoder.outputs.expanded(layers)), graph.outputs)
    problems += _cache_problems(graph, layers, (0, decoder.num_key_value_heads, 0, decoder.head_size or None))
    problems += _logits_problems(graph, decoder.outputs.logits, model.vocab_size)
    ends = model.stop_tokens
    if checkpoint is not None and ends != (expected := end_tokens(checkpoint)):
        problems.append(f"{GENAI} has stop tokens {sorted(ends)}, the checkpoint {sorted(expected)}")
    return problems


def optimum_problems(folder: Path, graph: Graph, checkpoint: Path | None) -> list[str]:
    """Return contradictions between config.json, generation_config.json, the graph and the checkpoint."""
    config = read_json(folder / "config.json")
    layers = read_number(folder / "config.json", config, "num_hidden_layers")
    heads = config.get("num_key_value_heads", config.get("num_attention_heads"))
    cached = [f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")]
    plain = sorted(_PLAIN_INPUTS & set(graph.inputs) | {"input_ids", "attention_mask"})
    problems = _names("inputs", [*plain, *cached], graph.inputs)
    presents = [name.replace("past_key_values", "present") for name in cached]
    problems += _names("outputs", ["logits", *presents], graph.outputs)
    problems += _cache_problems(graph, layers, (0, heads, 0, config.get("head_dim")))
    problems += _logits_problems(graph, "logits", config.get("vocab_size"))
    if not layers:
        problems.append("config.json names no layers")
    if checkpoint is not None and (ends := end_tokens(folder)) != (expected := end_tokens(checkpoint)):
        problems.append(f"the folder has stop tokens {sorted(ends)}, the checkpoint {sorted(expected)}")
    return problems


def _names(what: str, expected: Sequence[str], actual: Mapping[str, Shape]) -> list[str]:
    missing, unknown = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    problems = [f"the graph has no {what} {', '.join(missing[:4])}"] if missing else []
    return problems + ([f"the graph's {what} {', '.join(unknown[:4])} are not in the config"] if unknown else [])


def _cache_problems(graph: Graph, layers: int, expected: tuple[int, object, int, object]) -> list[str]:
    """Compare each cache tensor's shape [b, n_kv, s, d] with n_kv and d in the config."""
    for name in (f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")):
        shape = graph.inputs.get(name, ())
        if len(shape) != 4 and shape:
            return [f"{name} has shape {shape}, not [batch, heads, length, size]"]
        for axis in (1, 3):
            if shape and isinstance(shape[axis], int) and expected[axis] not in (None, shape[axis]):
                return [f"{name} has shape {shape}, the config says {expected[axis]} at axis {axis}"]
    return []


def _logits_problems(graph: Graph, name: str, n_vocab: object) -> list[str]:
    shape = graph.outputs.get(name, ())
    if shape and isinstance(shape[-1], int) and shape[-1] != n_vocab:
        return [f"{name} has {shape[-1]} entries, the config says {n_vocab}"]
    return []

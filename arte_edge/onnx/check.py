"""What an ONNX file says of itself: inputs, outputs, and the tensors that lie in other files.

Read with the `onnx` library and without the weights, so that a file of any size is judged in
seconds.

Is an exported ONNX folder what it says it is: whole, well-formed, and named as its readers expect.

Nothing is assumed of the exporters: the files are read again. What the model computes is not
judged here, that is the gate's work (`arte_edge.verify`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from arte_edge.errors import ArteError, InputError
from arte_edge.onnx.tokenizer import end_tokens, read_json

__all__ = [
    "ExternalTensor",
    "Graph",
    "external_problems",
    "folder_problems",
    "genai_problems",
    "model_file",
    "optimum_problems",
    "read_graph",
    "require_sound",
]

Shape = tuple[int | str, ...]
# How much a writer may add behind the last tensor to end on a page.
_PADDING_BYTES = 65_536


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose bytes lie in another file. `need_bytes` follows from its shape and type."""

    name: str
    location: str
    offset: int
    length: int
    need_bytes: int


@dataclass(frozen=True)
class Graph:
    """The outside of an ONNX model: what it takes and gives, by name, with shapes (a name: any size)."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    externals: tuple[ExternalTensor, ...]
    domains: tuple[str, ...]
    op_types: dict[str, int]


def read_graph(path: Path) -> Graph:
    """Return the outside of the model in `path`.

    Raises:
        InputError: the file cannot be parsed.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is no public class
        raise InputError(f"{path} is no readable ONNX file: {error}", "Export or copy it again.") from error
    op_types: dict[str, int] = {}
    for node in model.graph.node:
        op_types[node.op_type] = op_types.get(node.op_type, 0) + 1
    held = {tensor.name for tensor in model.graph.initializer}
    return Graph(
        inputs={value.name: _shape(value) for value in model.graph.input if value.name not in held},
        outputs={value.name: _shape(value) for value in model.graph.output},
        externals=tuple(
            _external(tensor)
            for tensor in model.graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        ),
        domains=tuple(sorted(row.domain or "ai.onnx" for row in model.opset_import)),
        op_types=op_types,
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
    return ExternalTensor(
        tensor.name, entries.get("location", ""), offset, int(entries.get("length", need)), need
    )


def external_problems(path: Path, graph: Graph) -> list[str]:
    """Return what is wrong with the files that hold the tensors of the model in `path`.

    Each file must lie beside the model, be large enough for every tensor in it, and end with the last.
    """
    problems: list[str] = []
    ends: dict[str, int] = {}
    for tensor in graph.externals:
        plain = PurePosixPath(tensor.location)
        if not tensor.location or plain.is_absolute() or plain.name != tensor.location:
            problems.append(
                f"{path.name}: {tensor.name} lies in '{tensor.location}', which is no plain file name"
            )
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
            problems.append(f"{name}, which holds tensors of {path.name}, is missing")
        elif not end <= file.stat().st_size <= end + _PADDING_BYTES:
            problems.append(f"{name} has {file.stat().st_size} bytes, the tensors in it end at {end}")
    return problems


_GENAI = "genai_config.json"
# What a decoder of either layout may ask for besides its cache.
_PLAIN_INPUTS = {"input_ids", "attention_mask", "position_ids"}


def model_file(folder: Path) -> Path:
    """Return the ONNX file of an exported folder: genai_config.json names it, or it lies alone in ``onnx/``.

    Raises:
        InputError: there is none, or more than one.
    """
    if (folder / _GENAI).is_file():
        decoder = _decoder(read_json(folder / _GENAI))
        return folder / str(decoder.get("filename", "model.onnx"))
    below = folder / "onnx" if (folder / "onnx").is_dir() else folder
    found = sorted(below.glob("*.onnx"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(
            f"{folder} must hold one ONNX model, it holds {names}", "Name a folder that export wrote."
        )
    return found[0]


def require_sound(folder: Path, checkpoint: Path) -> None:
    """Raise unless `folder`, exported from `checkpoint`, has no problem.

    Raises:
        ArteError: with every problem.
    """
    if problems := folder_problems(folder, checkpoint):
        raise ArteError(
            "The ONNX export is not sound:\n" + "\n".join(f"  {problem}" for problem in problems),
            "Nothing was kept. Please report this with the versions of onnxruntime and its exporter.",
        )


def folder_problems(folder: Path, checkpoint: Path | None = None) -> list[str]:
    """Return what is wrong with an exported folder of either layout, in plain words; empty if nothing is.

    Args:
        checkpoint: what it was exported from; without it the end tokens are not compared.
    """
    is_genai = (folder / _GENAI).is_file()
    try:
        path = model_file(folder)
        if not path.is_file():
            return [f"{path.name} is missing"]
        graph = read_graph(path)
        problems = external_problems(path, graph)
        if not problems:  # the checker would name the first of them only
            problems += _checker(path)
        problems += [f"{name} is left over" for name in _strays(path, graph)]
        problems += (genai_problems if is_genai else optimum_problems)(folder, graph, checkpoint)
    except ArteError as error:
        return [error.message]
    if not (folder / "tokenizer.json").is_file():
        problems.append("tokenizer.json is missing")
    return problems


def _checker(path: Path) -> list[str]:
    """Run ONNX's own checker, by path, so that it looks at the external data too."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # ValidationError is no public class in every release
        return [f"onnx.checker: {str(error).strip().splitlines()[0]}"]
    return []


def _strays(path: Path, graph: Graph) -> list[str]:
    """Return the names of weight files beside the model that no tensor of it lies in."""
    used = {tensor.location for tensor in graph.externals}
    return [file.name for file in sorted(path.parent.glob(f"{path.name}?*")) if file.name not in used]


def genai_problems(folder: Path, graph: Graph, checkpoint: Path | None) -> list[str]:
    """Return where genai_config.json and the graph contradict each other or the checkpoint."""
    config = read_json(folder / _GENAI)
    model, decoder = config.get("model", {}), _decoder(config)
    layers = int(decoder.get("num_hidden_layers", 0))
    inputs = list(_expand(decoder.get("inputs", {}), layers))
    outputs = list(_expand(decoder.get("outputs", {}), layers))
    problems = _names("inputs", inputs, graph.inputs) + _names("outputs", outputs, graph.outputs)
    kv = (0, decoder.get("num_key_value_heads"), 0, decoder.get("head_size"))
    problems += _cache_problems(graph, layers, kv)
    problems += _logits_problems(graph, str(decoder.get("outputs", {}).get("logits", "logits")), model)
    if not layers:
        problems.append(f"{_GENAI} names no layers")
    if checkpoint is not None:
        ids = model.get("eos_token_id")
        ends = frozenset([ids] if isinstance(ids, int) else ids or ())
        if ends != (wanted := end_tokens(checkpoint)):
            problems.append(f"{_GENAI} ends texts with {sorted(ends)}, the checkpoint with {sorted(wanted)}")
    return problems


def optimum_problems(folder: Path, graph: Graph, checkpoint: Path | None) -> list[str]:
    """Return where config.json, generation_config.json and the graph contradict each other or the checkpoint."""
    config = read_json(folder / "config.json")
    layers = int(config.get("num_hidden_layers", 0))
    heads = config.get("num_key_value_heads", config.get("num_attention_heads"))
    cached = [f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")]
    plain = sorted(_PLAIN_INPUTS & set(graph.inputs) | {"input_ids", "attention_mask"})
    problems = _names("inputs", [*plain, *cached], graph.inputs)
    presents = [name.replace("past_key_values", "present") for name in cached]
    problems += _names("outputs", ["logits", *presents], graph.outputs)
    problems += _cache_problems(graph, layers, (0, heads, 0, config.get("head_dim")))
    problems += _logits_problems(graph, "logits", config)
    if not layers:
        problems.append("config.json names no layers")
    if checkpoint is not None and (ends := end_tokens(folder)) != (wanted := end_tokens(checkpoint)):
        problems.append(f"the folder ends texts with {sorted(ends)}, the checkpoint with {sorted(wanted)}")
    return problems


def _decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config.get("model", {}).get("decoder", {}))


def _expand(names: Mapping[str, str], layers: int) -> Iterator[str]:
    """Yield the graph's names behind those of genai_config.json, where %d stands for each layer."""
    for name in names.values():
        yield from (name.replace("%d", str(i)) for i in range(layers)) if "%d" in name else (name,)


def _names(what: str, named: Sequence[str], there: Mapping[str, Shape]) -> list[str]:
    missing, unnamed = sorted(set(named) - set(there)), sorted(set(there) - set(named))
    problems = [f"the graph has no {what} {', '.join(missing[:4])}"] if missing else []
    return problems + ([f"the graph's {what} {', '.join(unnamed[:4])} are named nowhere"] if unnamed else [])


def _cache_problems(graph: Graph, layers: int, wanted: tuple[int, object, int, object]) -> list[str]:
    """Compare each cache tensor's shape [b, n_kv, s, d] with what the config says of n_kv and d."""
    for name in (f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")):
        shape = graph.inputs.get(name, ())
        if len(shape) != 4 and shape:
            return [f"{name} has shape {shape}, not [batch, heads, length, size]"]
        for axis in (1, 3):
            if shape and isinstance(shape[axis], int) and wanted[axis] not in (None, shape[axis]):
                return [f"{name} has shape {shape}, the config says {wanted[axis]} at axis {axis}"]
    return []


def _logits_problems(graph: Graph, name: str, config: Mapping[str, Any]) -> list[str]:
    shape = graph.outputs.get(name, ())
    if shape and isinstance(shape[-1], int) and shape[-1] != config.get("vocab_size"):
        return [f"{name} has {shape[-1]} entries, the config says {config.get('vocab_size')}"]
    return []

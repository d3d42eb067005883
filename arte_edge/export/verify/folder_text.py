"""What a model folder's own text files say: chat template, special and added tokens, ONNX precision."""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from arte_edge.errors import InputError
from arte_edge.export.onnx_check import model_file
from arte_edge.export.onnx_graph import external_problems, read_graph
from arte_edge.export.onnx_tokens import read_json

__all__ = ["FolderText", "check_files", "onnx_precision"]


class FolderText:
    """The tokenizer files of a folder, read as transformers and onnxruntime-genai read them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = read_json(folder / "tokenizer_config.json")

    @cached_property
    def chat_template(self) -> str | None:
        """Jinja source; a file of its own goes before the configuration's, the one named default before others."""
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        found = read_json(self._folder / "chat_template.json").get("chat_template")
        found = found or self._config.get("chat_template")
        if isinstance(found, list):
            found = {row.get("name"): row.get("template") for row in found}.get("default")
        return found if isinstance(found, str) else None

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token`` and ``eos_token`` as text, empty where the folder names none."""
        return {key: _text(self._config.get(key)) for key in ("bos_token", "eos_token")}

    @cached_property
    def added(self) -> dict[int, str]:
        """Added tokens by id, in the order of their ids."""
        rows: list[dict[str, Any]] = read_json(self._folder / "tokenizer.json").get("added_tokens") or []
        return {row["id"]: row["content"] for row in sorted(rows, key=lambda row: int(row["id"]))}


def _text(token: object) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def check_files(folder: Path) -> None:
    """Raise if a file that the folder's ONNX model needs is missing or cut short.

    Raises:
        InputError: with the first problem.
    """
    path = model_file(folder)
    if not path.is_file():
        raise InputError(f"{folder}: {path.name} is missing", "Export or copy the folder again.")
    if find_spec("onnx") is None:  # on a device: onnxruntime then finds most of it when it loads the model
        return
    if problems := external_problems(path, read_graph(path)):
        raise InputError(f"{folder}: {problems[0]}", "Export or copy the folder again.")


def onnx_precision(folder: Path) -> str:
    """Return ``int4``, ``int8``, ``fp16`` or ``fp32`` from the graph; empty without the `onnx` package."""
    if find_spec("onnx") is None:
        return ""
    import onnx

    graph = onnx.load(str(model_file(folder)), load_external_data=False).graph
    bits = [
        a.i
        for node in graph.node
        if node.op_type == "MatMulNBits"
        for a in node.attribute
        if a.name == "bits"
    ]
    if bits:
        return f"int{min(bits)}"
    if any(
        node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul") for node in graph.node
    ):
        return "int8"
    kinds = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
    return "fp16" if onnx.TensorProto.FLOAT16 in kinds else "fp32"

"""An exported ONNX decoder in plain onnxruntime and numpy: logits, cached steps, greedy text.

Everything a step reads and writes is bound to buffers of ours, so that nothing is allocated or
copied around the graph. That alone is most of what makes this faster than going through torch.

Notation: n tokens of a call, v vocabulary size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import EngineError, InputError, first_line, reading
from arte_edge.extras import need
from arte_edge.files import read_json
from arte_edge.machine import thread_count
from arte_edge.model_folder import chat_templates, token_text, tokenizer_files
from arte_edge.onnx.check import external_problems, model_file, read_graph
from arte_edge.onnx.files import GENAI, FileTokenizer, added_tokens, end_tokens, read_genai_config, read_number
from arte_edge.runtimes.protocol import BaseRuntime, RuntimeFacts, check_context, readable, until_stop


@dataclass(frozen=True)
class CacheTensor:
    """One cached tensor of a graph: shape [1, n_kv, s, d], its names on both sides."""

    past: str
    present: str
    n_kv: int
    head_size: int
    dtype: np.dtype[Any]


class Cache(Protocol):
    """The keys and values that a session has computed."""

    def reserve(self, n_past: int, n_total: int) -> None:
        """Grow to `n_total` tokens; the first `n_past` are preserved."""

    def bind(self, binding: Any, n_past: int, n_total: int) -> None:
        """Bind the tensors for a step that comes after `n_past` tokens and ends at `n_total`."""

    def stepped(self) -> None:
        """Make the output of the last step the past of the next."""


def _room(n_total: int, limit: int) -> int:
    """Return a capacity that rarely has to grow: a power of two, at least 256, at most `limit`."""
    wanted = max(256, 1 << max(n_total - 1, 0).bit_length())
    return max(n_total, min(wanted, limit) if limit else wanted)


class SharedCache:
    """Buffers [1, n_kv, c, d] that are past and present at once."""

    def __init__(self, tensors: list[CacheTensor], limit: int) -> None:
        self._tensors, self._limit = tensors, limit
        self._buffers: list[NDArray[Any]] = []
        self._capacity = 0
        self._is_bound = False

    def reserve(self, n_past: int, n_total: int) -> None:
        if n_total <= self._capacity:
            return
        self._capacity = _room(n_total, self._limit)
        old, self._buffers = self._buffers, []
        for i, tensor in enumerate(self._tensors):
            new = np.zeros((1, tensor.n_kv, self._capacity, tensor.head_size), tensor.dtype)
            if n_past:
                new[:, :, :n_past] = old[i][:, :, :n_past]
            self._buffers.append(new)
        self._is_bound = False

    def bind(self, binding: Any, n_past: int, n_total: int) -> None:
        if self._is_bound:
            return
        for tensor, buffer in zip(self._tensors, self._buffers, strict=True):
            place = ("cpu", 0, tensor.dtype.type, buffer.shape, buffer.ctypes.data)
            binding.bind_input(tensor.past, *place)
            binding.bind_output(tensor.present, *place)
        self._is_bound = True

    def stepped(self) -> None:
        """Nothing to do: the new keys are already after the old ones."""


class PairedCache:
    """Two flat buffers for each tensor; [1, n_kv, s, d] fills the front of one, the next step that of the other."""

    def __init__(self, tensors: list[CacheTensor], limit: int) -> None:
        self._tensors, self._limit = tensors, limit
        self._past: list[NDArray[Any]] = []
        self._present: list[NDArray[Any]] = []
        self._capacity = 0

    def reserve(self, n_past: int, n_total: int) -> None:
        if n_total <= self._capacity:
            return
        self._capacity = _room(n_total, self._limit)
        old = self._past
        sizes = [tensor.n_kv * tensor.head_size for tensor in self._tensors]
        self._past, self._present = (
            [np.empty(size * self._capacity, tensor.dtype) for size, tensor in zip(sizes, self._tensors, strict=True)]
            for _ in range(2)
        )
        if n_past:
            for new, kept, size in zip(self._past, old, sizes, strict=True):
                new[: size * n_past] = kept[: size * n_past]

    def bind(self, binding: Any, n_past: int, n_total: int) -> None:
        for tensor, past, present in zip(self._tensors, self._past, self._present, strict=True):
            before, after = ((1, tensor.n_kv, n, tensor.head_size) for n in (n_past, n_total))
            kind = tensor.dtype.type
            binding.bind_input(tensor.past, "cpu", 0, kind, before, past.ctypes.data)
            binding.bind_output(tensor.present, "cpu", 0, kind, after, present.ctypes.data)

    def stepped(self) -> None:
        self._past, self._present = self._present, self._past


_DTYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}


@dataclass(frozen=True)
class Layout:
    """How to run one exported folder. In the names of the cache %d stands for the layer."""

    path: Path  # of the ONNX file
    past_key: str
    past_value: str
    present_key: str
    present_value: str
    head_size: int  # 0 if the graph says it itself
    is_shared: bool  # past and present may be one buffer
    context_length: int  # that the model was made for, 0 if not known
    n_vocab: int  # for a graph that does not say it
    stop_tokens: frozenset[int]

    def cache_tensors(self, inputs: Sequence[Any]) -> list[CacheTensor]:
        """Return the cached tensors of a session's `inputs` (name, shape, type), layer by layer.

        Raises InputError: the graph has no cache, or one of a kind that cannot be bound.
        """
        by_name = {value.name: value for value in inputs}
        tensors: list[CacheTensor] = []
        while (key := self.past_key.replace("%d", str(layer := len(tensors) // 2))) in by_name:
            for past, present in ((self.past_key, self.present_key), (self.past_value, self.present_value)):
                value = by_name[past.replace("%d", str(layer))]
                heads, size = value.shape[1], value.shape[3] if isinstance(value.shape[3], int) else 0
                if value.type not in _DTYPES or not isinstance(heads, int) or not (size or self.head_size):
                    raise InputError(
                        f"{self.path.name}: cache {value.name} is {value.type} {value.shape}",
                        "Only caches of fp32 or fp16 with known heads can be run here.",
                    )
                name = present.replace("%d", str(layer))
                tensors.append(CacheTensor(value.name, name, heads, size or self.head_size, _DTYPES[value.type]))
        if not tensors:
            raise InputError(f"{self.path.name} has no key-value cache: {key} is missing", "Export it again.")
        return tensors


def read_layout(folder: Path) -> Layout:
    """Return how to run the exported `folder`, from its config files.

    Raises InputError: it holds no ONNX model, or its config cannot be read.
    """
    path = model_file(folder)
    if not path.is_file():
        raise InputError(f"{path} does not exist", "Name a folder that `arte-edge export` wrote.")
    if not (folder / GENAI).is_file():
        source = folder / "config.json"
        plain = read_json(source)
        names = ("past_key_values.%d.key", "past_key_values.%d.value", "present.%d.key", "present.%d.value")
        limit, n_vocab = (read_number(source, plain, key) for key in ("max_position_embeddings", "vocab_size"))
        return Layout(path, *names, 0, False, limit, n_vocab, end_tokens(folder))
    model, is_shared = read_genai_config(folder)
    inputs, outputs = model.decoder.inputs, model.decoder.outputs
    return Layout(
        path,
        *(inputs.past_key_names, inputs.past_value_names),
        *(outputs.present_key_names, outputs.present_value_names),
        head_size=model.decoder.head_size,
        is_shared=is_shared,
        context_length=model.context_length,
        n_vocab=model.vocab_size,
        stop_tokens=model.stop_tokens,
    )


class FolderRuntime(BaseRuntime):
    """The text side of a folder with an ONNX model: its tokenizer files, read as transformers reads them."""

    n_vocab: int

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = folder.resolve().name
        with reading(folder):
            config = read_json(folder / "tokenizer_config.json")
            self.special_tokens = {key: token_text(config.get(key)) for key in ("bos_token", "eos_token")}
            self.chat_template = chat_templates(tokenizer_files(folder)).get("default")

    @cached_property
    def quantization(self) -> str:
        return onnx_precision(self._folder)

    @cached_property
    def tokenizer(self) -> FileTokenizer:
        return FileTokenizer(self._folder)

    @cached_property
    def _added(self) -> dict[int, str]:
        return added_tokens(self._folder)

    @property
    def added_tokens(self) -> tuple[str, ...]:
        return tuple(self._added.values())

    def token_text(self, token: int) -> str:
        return self._added.get(token) or self.tokenizer.text([token], special=True) or f"[{token}]"

    def vocabulary(self) -> list[str]:
        return readable(self.tokenizer.text([token]) for token in range(self.n_vocab))

    @abstractmethod
    def tokenize(self, text: str) -> list[int]: ...

    @abstractmethod
    def written(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """Yield up to `max_tokens` tokens that the model writes greedily after `prompt`, without a stop token."""

    def _generate(self, prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        return [self._text(self.tokenize(prompt), max_tokens, stop, self.tokenizer.text) for prompt in prompts]

    def _text(
        self, prompt: Sequence[int], max_tokens: int, stop: tuple[str, ...], decode: Callable[[list[int]], str]
    ) -> str:
        ids: list[int] = []
        for token in self.written(prompt, max_tokens):
            ids.append(token)
            if stop and (cut := until_stop(decode(ids), stop)) is not None:
                return cut
        return decode(ids)


def check_files(folder: Path) -> None:
    """Raise if a file that the folder's ONNX model needs is missing or cut short.

    Raises InputError: with the first problem.
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
    bits = [a.i for node in graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"]
    if bits:
        return f"int{min(bits)}"
    if any(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul") for node in graph.node):
        return "int8"
    kinds = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
    return "fp16" if onnx.TensorProto.FLOAT16 in kinds else "fp32"


_CHUNK = 512  # tokens read at once: bounds the memory for logits and attention of a long prompt
_ERRORS_ONLY = 3  # onnxruntime's log level


class OnnxSession:
    """One model, one text at a time: what was read stays in the cache until `reset`.

    Attributes:
        n_vocab: size of the vocabulary, v.
        n_past: tokens in the cache.
        stop_tokens: ids that end a text, from the folder's own config.
        context_length: tokens the model was made for, 0 if not known.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        """Load the model in `folder`, in the layout of onnxruntime-genai or optimum.

        Args:
            threads: default ``ARTE_EDGE_THREADS``, else the cores this process may use.

        Raises InputError: the folder holds no model that can be run, or a file of it is broken;
        ArteError: onnxruntime is not installed.
        """
        need("onnx", "Running ONNX models")
        import onnxruntime

        layout = read_layout(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = thread_count(threads)
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(layout.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise InputError(
                f"{layout.path}: onnxruntime {onnxruntime.__version__} cannot load this model: {first_line(error)}",
                "It may be truncated, or made for a newer onnxruntime: export or copy it again.",
            ) from error
        self.stop_tokens, self.context_length = layout.stop_tokens, layout.context_length
        inputs = self._session.get_inputs()
        tensors = layout.cache_tensors(inputs)
        kind = SharedCache if layout.is_shared else PairedCache
        self._cache: Cache = kind(tensors, layout.context_length)
        names = {value.name for value in inputs} - {tensor.past for tensor in tensors}
        if unknown := sorted(names - {"input_ids", "attention_mask", "position_ids"}):
            raise InputError(
                f"{layout.path.name} needs the inputs {', '.join(unknown)}", "It is not a plain text decoder."
            )
        self._names = names
        (logits,) = (value for value in self._session.get_outputs() if value.name == "logits")
        self._logits_type = np.float16 if logits.type == "tensor(float16)" else np.float32
        self.n_vocab: int = logits.shape[-1] if isinstance(logits.shape[-1], int) else layout.n_vocab
        self._binding: Any = self._session.io_binding()
        self.n_past = 0
        self._ones = np.ones(0, np.int64)
        self._range = np.arange(0, dtype=np.int64)
        self._row: NDArray[Any] = np.empty((1, 1, self.n_vocab), self._logits_type)

    def reset(self) -> None:
        """Empty the cache; the buffers are reused."""
        self.n_past = 0

    def step(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Read `ids` after what was read before and return their logits, [n, v].

        The row of a single token is overwritten by the next call.

        Raises InputError: `ids` is empty or holds an id outside the vocabulary; EngineError: onnxruntime failed.
        """
        tokens = np.asarray(ids, np.int64)
        if not tokens.size or tokens.min() < 0 or tokens.max() >= self.n_vocab:
            raise InputError("Token ids must be inside the vocabulary, and at least one", "")
        if tokens.size <= _CHUNK:
            return self._run(tokens)
        parts = (tokens[i : i + _CHUNK] for i in range(0, tokens.size, _CHUNK))
        return np.concatenate([self._run(part) for part in parts])

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits of a text read from its start, [n, v]. Row i predicts token i + 1."""
        self.reset()
        return self.step(ids).copy()

    def write(self, ids: Sequence[int], max_new: int, stop: Collection[int] | None = None) -> Iterator[int]:
        """Yield the most likely continuation of `ids`, token by token.

        Args:
            ids: the prompt; it may continue a text that was read by `step`.
            max_new: tokens at most. The context length also ends a text.
            stop: ids that end the text and are not yielded; default the model's own `stop_tokens`.
        """
        ends = self.stop_tokens if stop is None else stop
        row = self.step(ids)[-1]
        for written in range(max_new):
            token = int(row.argmax())
            if token in ends:
                return
            yield token
            if written + 1 == max_new or 0 < self.context_length <= self.n_past:
                return
            row = self.step([token])[-1]

    def generate(self, ids: Sequence[int], max_new: int, stop: Collection[int] | None = None) -> list[int]:
        """Return the most likely continuation of the text `ids`, read from its start; see `write`."""
        self.reset()
        return list(self.write(ids, max_new, stop))

    def close(self) -> None:
        """Free the memory."""
        self._session = self._binding = None

    def _run(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read `tokens`, at most a chunk, and return their logits [n, v]."""
        n, total = tokens.size, self.n_past + tokens.size
        self._cache.reserve(self.n_past, total)
        if self._ones.size < total:
            room = max(256, 2 * total)
            self._ones, self._range = np.ones(room, np.int64), np.arange(room, dtype=np.int64)
        binding = self._binding
        tokens = np.ascontiguousarray(tokens)
        binding.bind_input("input_ids", "cpu", 0, np.int64, (1, n), tokens.ctypes.data)
        if "attention_mask" in self._names:
            binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), self._ones.ctypes.data)
        if "position_ids" in self._names:
            positions = self._range[self.n_past :]
            binding.bind_input("position_ids", "cpu", 0, np.int64, (1, n), positions.ctypes.data)
        out = self._row if n == 1 else np.empty((1, n, self.n_vocab), self._logits_type)
        binding.bind_output("logits", "cpu", 0, self._logits_type, out.shape, out.ctypes.data)
        try:
            self._cache.bind(binding, self.n_past, total)
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"onnxruntime failed: {first_line(error)}", "The model may be broken.") from error
        self._cache.stepped()
        self.n_past = total
        rows: NDArray[np.float32] = out[0].astype(np.float32, copy=False)
        return rows


class OnnxRuntime(FolderRuntime):
    """`Runtime` of a folder with one ONNX decoder.

    The graph computes logits for every token it reads, whether or not they are used: that belongs to its rate.
    """

    def __init__(self, folder: Path, threads: int | None = None, context_tokens: int = 0) -> None:
        """Load the folder; `context_tokens`: see `GenaiRuntime`.

        Raises InputError: no model that can be run, or it was made for fewer tokens;
        ArteError: onnxruntime is not installed.
        """
        super().__init__(folder)
        self._session = session = OnnxSession(folder, threads)
        import onnxruntime

        check_context(folder.name, session.context_length, context_tokens)
        self.context_tokens = context_tokens or session.context_length or 2**31
        self.n_vocab = session.n_vocab
        self.eos_tokens = self.stop_tokens = session.stop_tokens
        if not context_tokens:
            self.tokenizer  # noqa: B018 (an unreadable tokenizer.json is reported on opening)
        self.facts = RuntimeFacts(
            runtime=f"onnxruntime {onnxruntime.__version__}", build=" ".join(onnxruntime.get_build_info().split())
        )

    def clear(self) -> None:
        self._session.reset()

    def prefill(self, tokens: Sequence[int]) -> int:
        return int(self._session.step(tokens)[-1].argmax())

    def step(self, token: int) -> None:
        self._session.step((token,))

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.tokens(text)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return self._session.logits(ids)

    def written(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        self._session.reset()
        return self._session.write(prompt, max_tokens)

    def close(self) -> None:
        self._session.close()

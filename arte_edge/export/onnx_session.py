"""An exported ONNX decoder in plain onnxruntime and numpy: logits, cached steps, greedy text.

Everything a step reads and writes is bound to buffers of ours, so that nothing is allocated or
copied around the graph. That alone is most of what makes this faster than going through torch.

Notation: n tokens of a call, v vocabulary size.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.engines.llama_runtime import default_threads
from arte_edge.errors import EngineError, InputError
from arte_edge.export.onnx_cache import Cache, PairedCache, SharedCache
from arte_edge.export.onnx_layout import read_layout
from arte_edge.export.onnx_tokens import FileTokenizer
from arte_edge.extras import need

__all__ = ["OnnxSession"]

_CHUNK = 512  # tokens read at once: bounds the memory for logits and attention of a long prompt
_ERRORS_ONLY = 3  # onnxruntime's log level


class OnnxSession:
    """One model, one text at a time: what was read stays in the cache until `reset`.

    Attributes:
        n_vocab: size of the vocabulary, v.
        n_past: tokens in the cache.
        stop_tokens: ids that end a text, from the folder's own config.
        context_length: tokens the model was made for, 0 if not known.
        tokenizer: the folder's tokenizer.json.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        """Load the model that lies in `folder`, of onnxruntime-genai's or optimum's layout.

        Args:
            threads: default ``ARTE_EDGE_THREADS``, else the cores this process may use.

        Raises:
            InputError: the folder holds no model that can be run, or a file of it is broken.
            ArteError: onnxruntime is not installed.
        """
        need("onnx", "Running ONNX models")
        import onnxruntime

        layout = read_layout(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = (
            threads or int(os.environ.get("ARTE_EDGE_THREADS", "0")) or default_threads()
        )
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(layout.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise InputError(
                f"{layout.path}: onnxruntime {onnxruntime.__version__} cannot load this model: {_first(error)}",
                "It may be truncated, or made for a newer onnxruntime: export or copy it again.",
            ) from error
        self.tokenizer = FileTokenizer(folder)
        self.stop_tokens, self.context_length = layout.stop_tokens, layout.context_length
        inputs = self._session.get_inputs()
        tensors = layout.cache_tensors(inputs)
        kind = SharedCache if layout.is_shared else PairedCache
        self._cache: Cache = kind(tensors, layout.context_length)
        names = {value.name for value in inputs} - {tensor.past for tensor in tensors}
        if unknown := sorted(names - {"input_ids", "attention_mask", "position_ids"}):
            raise InputError(
                f"{layout.path.name} asks for {', '.join(unknown)}", "It is no plain text decoder."
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
        """Forget what was read; the buffers are kept."""
        self.n_past = 0

    def step(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Read `ids` after what was read before and return their logits, [n, v].

        The row of a single token is overwritten by the next call.

        Raises:
            InputError: `ids` is empty or holds an id outside the vocabulary.
            EngineError: onnxruntime failed.
        """
        tokens = np.asarray(ids, np.int64)
        if not tokens.size or tokens.min() < 0 or tokens.max() >= self.n_vocab:
            raise InputError("Token ids must be inside the vocabulary, and at least one", "")
        if tokens.size <= _CHUNK:
            return self._run(tokens)
        parts = (tokens[i : i + _CHUNK] for i in range(0, tokens.size, _CHUNK))
        return np.concatenate([self._run(part) for part in parts])

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits of a text read from its start, [n, v]. Row i foretells token i + 1."""
        self.reset()
        return self.step(ids).copy()

    def write(self, ids: Sequence[int], max_new: int, stop: Collection[int] | None = None) -> Iterator[int]:
        """Yield the most likely continuation of `ids`, token by token.

        Args:
            ids: the prompt; it may go on from a text that was read, after `step`.
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
        """Give the memory back."""
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
        self._cache.bind(binding, self.n_past, total)
        out = self._row if n == 1 else np.empty((1, n, self.n_vocab), self._logits_type)
        binding.bind_output("logits", "cpu", 0, self._logits_type, out.shape, out.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"onnxruntime failed: {_first(error)}", "The model may be broken.") from error
        self._cache.stepped()
        self.n_past = total
        rows: NDArray[np.float32] = out[0].astype(np.float32, copy=False)
        return rows


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

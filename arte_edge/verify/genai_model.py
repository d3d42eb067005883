"""A folder for onnxruntime-genai, opened in that runtime: its own tokenizer, its own decoding.

onnxruntime-genai reads tokenizer.json with code of its own, not with the `tokenizers`
library, so its ids are compared like any other runtime's. Where it alone departs from
what the file says, the gate tells that apart: no exporter can change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import EngineError, InputError
from arte_edge.extras import need
from arte_edge.onnx.tokenizer import FileTokenizer, read_json
from arte_edge.runtimes.onnxruntime import FolderText, check_files, onnx_precision
from arte_edge.runtimes.prompt_render import Message
from arte_edge.verify.onnx_model import until_stop
from arte_edge.verify.opened import Memo, rendered

__all__ = ["GenaiModel"]


class GenaiModel:
    """`Opened` for a folder with genai_config.json."""

    def __init__(self, folder: Path) -> None:
        """Check the folder's files and load the model.

        Raises:
            InputError: a file is missing, cut short, or the runtime does not load it.
            ArteError: onnxruntime-genai is not installed.
        """
        need("onnx", "Running ONNX models")
        try:
            import onnxruntime_genai as runtime
        except ImportError as error:
            raise EngineError(
                "Running this folder needs onnxruntime-genai", "pip install 'arte-edge[onnx]'"
            ) from error
        check_files(folder)
        config = read_json(folder / "genai_config.json").get("model", {})
        self._runtime: Any = runtime
        try:
            self._model: Any = runtime.Model(str(folder))
            self._tokenizer: Any = runtime.Tokenizer(self._model)
            # Without it the runtime leaves the begin token to the template, and raw text would lack it.
            self._tokenizer.update_options(add_special_tokens="true")
        except Exception as error:  # the runtime's exceptions share no public base class
            first = str(error).strip().splitlines()[0]
            raise InputError(
                f"{folder}: onnxruntime-genai {runtime.__version__} cannot load this folder: {first}",
                "It may be cut short or made for a newer runtime: export or copy it again.",
            ) from error
        text = FolderText(folder)
        self._file_tokenizer = FileTokenizer(folder)
        self.name = folder.resolve().name
        self.runtime = f"onnxruntime-genai {runtime.__version__}"
        self.quantization = onnx_precision(folder)
        self.chat_template = text.chat_template
        self.special_tokens = text.special_tokens
        self.added_tokens = tuple(text.added.values())
        ends = config.get("eos_token_id")
        self.eos_tokens = frozenset([ends] if isinstance(ends, int) else ends or ())
        self.stop_tokens = self.eos_tokens
        self.n_vocab = int(config.get("vocab_size", 0))
        self.context_tokens = int(config.get("context_length", 0)) or 2**31
        self._added = text.added
        self._memo = Memo(self._write)

    def tokens(self, text: str) -> list[int]:
        """See `Opened.tokens`; a BOS that the template wrote is not doubled."""
        ids = [int(token) for token in self._tokenizer.encode(text)]
        bos = self._file_tokenizer.bos
        return ids[1:] if bos and text.startswith(bos) and len(ids) > 1 and ids[0] == ids[1] else ids

    def token_text(self, token: int) -> str:
        return self._added.get(token) or self._file_tokenizer.text([token], special=True) or f"[{token}]"

    def file_tokens(self, text: str) -> list[int]:
        return self._file_tokenizer.tokens(text)

    def words(self) -> list[str]:
        texts = (self._file_tokenizer.text([token]) for token in range(self.n_vocab))
        return [text for text in texts if text and "\ufffd" not in text]

    def render(self, messages: Sequence[Message]) -> str | None:
        return rendered(self, messages)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        generator = self._generator(ids, 1)
        values: NDArray[np.float32] = np.array(generator.get_output("logits"), dtype=np.float32)
        values = values.reshape(-1, values.shape[-1])
        if len(values) == len(ids):
            return values
        # Some graphs give the last position only: then the text is read token by token.
        generator = self._generator(ids[:1], len(ids))
        rows = [np.array(generator.get_output("logits"), dtype=np.float32).reshape(-1)]
        for token in ids[1:]:
            generator.append_tokens(np.array([token], dtype=np.int32))
            rows.append(np.array(generator.get_output("logits"), dtype=np.float32).reshape(-1))
        return np.stack(rows)

    def _generator(self, ids: Sequence[int], n_more: int) -> Any:
        params = self._runtime.GeneratorParams(self._model)
        params.set_search_options(max_length=min(len(ids) + n_more, self.context_tokens), do_sample=False)
        generator = self._runtime.Generator(self._model, params)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        return generator

    def generate(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        return self._memo(prompts, max_tokens, stop)

    def _write(self, prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        return [self._one(prompt, max_tokens, stop) for prompt in prompts]

    def _one(self, prompt: str, max_tokens: int, stop: tuple[str, ...]) -> str:
        generator = self._generator(self.tokens(prompt), max_tokens)
        written: list[int] = []
        while not generator.is_done() and len(written) < max_tokens:
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self.stop_tokens:
                break
            written.append(token)
            if (cut := until_stop(self._file_tokenizer.text(written), stop)) is not None:
                return cut
        return self._file_tokenizer.text(written)

    def close(self) -> None:
        """Give the memory back; the model cannot be used afterwards."""
        vars(self).pop("_tokenizer", None)
        vars(self).pop("_model", None)

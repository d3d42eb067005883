"""A GGUF file, opened in llama.cpp."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import InputError
from arte_edge.gguf.reader import read_model_header
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.llamacpp.bindings import LlamaContext, Row
from arte_edge.runtimes.llamacpp.context_memory import ONE_SEQUENCE
from arte_edge.runtimes.llamacpp.engine import LlamaCppEngine
from arte_edge.runtimes.prompt_render import Message
from arte_edge.threads import thread_count
from arte_edge.verify.opened import Memo, rendered

__all__ = ["GgufModel"]

_CHUNK = 128  # rows of logits at once: with a vocabulary of 262,144 they are 134 MB
_CTX_STEP = 256  # tokens; contexts grow in steps, so that few are made
_PARALLEL = 16
_CONTROL, _USER_DEFINED = 1 << 3, 1 << 4  # llama.cpp: LLAMA_TOKEN_ATTR_*
_ADDED = _CONTROL | _USER_DEFINED
_NORMAL = 1  # GGUF: tokenizer.ggml.token_type of an ordinary token


class GgufModel:
    """`Opened` for a GGUF file."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Check the file's head and load it.

        Raises:
            InputError: not a GGUF, cut short, or one that llama.cpp does not load.
            EngineError: llama-cpp-python is not installed.
        """
        self._header = header = read_model_header(
            path
        )  # a file cut short would end in a crash inside the runtime
        self._threads = thread_count(threads)
        self._engine = LlamaCppEngine(
            path,
            sha256="",
            quantization=header.quantization,
            parallel=_PARALLEL,
            threads=self._threads,
        )
        self._model = self._engine.model
        self._context: LlamaContext | None = None
        lib, vocab = self._model.lib, self._model.vocab
        self.name = path.name
        self.runtime = self._engine.identity.runtime
        self.quantization = header.quantization
        self.chat_template = self._engine.chat_template
        self.special_tokens = self._engine.special_tokens
        self.n_vocab = self._model.n_vocab
        self.context_tokens = self._model.n_ctx_train
        eos = int(lib.llama_vocab_eos(vocab))
        self.eos_tokens = frozenset([eos] if eos >= 0 else [])
        self._memo = Memo(self._write)

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset(token for token in range(self.n_vocab) if self._model.is_end(token))

    @cached_property
    def added_tokens(self) -> tuple[str, ...]:
        lib, vocab = self._model.lib, self._model.vocab
        added = [token for token in range(self.n_vocab) if lib.llama_vocab_get_attr(vocab, token) & _ADDED]
        return tuple(text for token in added if (text := self.token_text(token)))

    def tokens(self, text: str) -> list[int]:
        return self._model.tokens(text)

    def token_text(self, token: int) -> str:
        if not 0 <= token < self.n_vocab:
            return f"[{token}]"
        return self._model.piece(token, special=True).decode(errors="replace")

    def file_tokens(self, text: str) -> list[int] | None:
        """See `Opened.file_tokens`; None unless `text` holds a token that llama.cpp made special by its name.

        Some families have ``</s>`` as an ordinary word of their vocabulary. llama.cpp
        ends generations there whatever the file says, and parses it in prompts.
        """
        if not any(name in text for name in self._promoted):
            return None
        lib, vocab = self._model.lib, self._model.vocab
        begin = self._model.tokens("")
        ids = list(begin)
        for part in self._specials.split(text):
            if part in self._special_ids:
                ids.append(self._special_ids[part])
                continue
            raw = part.encode()
            buffer = (ctypes.c_int32 * (len(raw) + 16))()
            ids += buffer[: lib.llama_tokenize(vocab, raw, len(raw), buffer, len(buffer), False, False)]
        return ids[1:] if len(begin) == 1 and ids[:2] == begin * 2 else ids

    @cached_property
    def _promoted(self) -> frozenset[str]:
        """Tokens that are ordinary in the file and special in the runtime."""
        field = self._header.field("tokenizer.ggml.token_type")
        kinds = [] if field is None else field.value
        lib, vocab = self._model.lib, self._model.vocab
        return frozenset(
            self.token_text(token)
            for token, kind in enumerate(kinds)
            if kind == _NORMAL and lib.llama_vocab_get_attr(vocab, token) & _CONTROL
        )

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        lib, vocab = self._model.lib, self._model.vocab
        ids = (token for token in range(self.n_vocab) if lib.llama_vocab_get_attr(vocab, token) & _ADDED)
        return {text: token for token in ids if (text := self.token_text(token)) not in self._promoted}

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self._special_ids), key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)")

    def words(self) -> list[str]:
        texts = (
            self._model.piece(token).decode(errors="replace")  # control tokens have no text
            for token in range(self.n_vocab)
        )
        return [text for text in texts if text and "\ufffd" not in text]

    def render(self, messages: Sequence[Message]) -> str | None:
        return rendered(self, messages)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        if (unknown := max(ids, default=0)) >= self.n_vocab:
            raise InputError(f"{self.name}: token {unknown} is not among its {self.n_vocab} tokens")
        context = self._context_for(len(ids))
        context.clear()
        rows = [Row(token, position, 0, want=True) for position, token in enumerate(ids)]
        values = np.empty((len(rows), self.n_vocab), dtype=np.float32)
        for start in range(0, len(rows), _CHUNK):
            values[start : start + _CHUNK] = context.decode(rows[start : start + _CHUNK])
        return values

    def _context_for(self, n_token: int) -> LlamaContext:
        if self._context is None or self._context.n_ctx_seq < n_token:
            self._drop_context()
            size = -(-n_token // _CTX_STEP) * _CTX_STEP
            self._context = LlamaContext(self._model, 1, size, self._threads, layout=ONE_SEQUENCE)
        return self._context

    def _drop_context(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None

    def generate(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        return self._memo(prompts, max_tokens, stop)

    def _write(self, prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        sampling = Sampling(max_tokens=max_tokens, stop=stop)
        return [done.text for done in self._engine.complete([Request(p) for p in prompts], sampling)]

    def close(self) -> None:
        self._drop_context()
        self._engine.close()

"""Folders for onnxruntime-genai, in that runtime: its own tokenizer, its own decoding.

onnxruntime-genai reads tokenizer.json with code of its own, not with the `tokenizers` library, so its ids are
compared like any other runtime's. Where it alone departs from what the file says, the gate tells that apart: no
exporter can change it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import EngineError, InputError, first_line
from arte_edge.onnx.files import read_genai_config
from arte_edge.runtimes.onnxruntime import FolderRuntime, check_files
from arte_edge.runtimes.prompt_render import Conversation
from arte_edge.runtimes.protocol import Rendered, RuntimeFacts, check_context


class GenaiRuntime(FolderRuntime):
    """`Runtime` of a folder with genai_config.json."""

    def __init__(self, folder: Path, threads: int | None = None, context_tokens: int = 0) -> None:
        """Check the folder's files and load the model.

        Args:
            context_tokens: room in the cache, for a benchmark, which needs no tokenizer; 0: the model's own.

        Raises InputError: a file is missing, cut short, or the runtime does not load it;
        EngineError: onnxruntime-genai is not installed.
        """
        try:
            import onnxruntime_genai as runtime
        except ImportError as error:
            raise EngineError("Running this folder needs onnxruntime-genai", "pip install 'arte-edge[onnx]'") from error
        check_files(folder)
        super().__init__(folder)
        model, _ = read_genai_config(folder)
        check_context(folder.name, model.context_length, context_tokens)
        self.eos_tokens = self.stop_tokens = model.stop_tokens
        self.n_vocab = model.vocab_size
        self.context_tokens = context_tokens or model.context_length or 2**31
        self._runtime: Any = runtime
        try:
            config = runtime.Config(str(folder))
            if threads:
                options = {"session_options": {"intra_op_num_threads": threads}}
                config.overlay(json.dumps({"model": {"decoder": options}}))
            self._model: Any = runtime.Model(config)
            if context_tokens:
                self._cache  # noqa: B018 (made before anything is timed)
            else:
                self._tokenizer: Any = runtime.Tokenizer(self._model)
                # Without it the runtime leaves the begin token to the template, and raw text would lack it.
                self._tokenizer.update_options(add_special_tokens="true")
                self.stop_tokens = frozenset(map(int, self._tokenizer.eos_token_ids))
        except Exception as error:  # the runtime's exceptions share no public base class
            raise InputError(
                f"{folder}: onnxruntime-genai {runtime.__version__} cannot load this folder: {first_line(error)}",
                "It may be cut short or made for a newer runtime: export or copy it again.",
            ) from error
        if not context_tokens:
            self.tokenizer  # noqa: B018 (an unreadable tokenizer.json is reported on opening)
        self.facts = RuntimeFacts(
            runtime=f"onnxruntime-genai {runtime.__version__}", build=f"device {self._model.device_type}"
        )

    @cached_property
    def _cache(self) -> Any:
        return self._generator(self.context_tokens)

    def clear(self) -> None:
        """Take the cache back to its beginning; the buffers stay."""
        if self._cache.token_count():
            self._cache.rewind_to(0)

    def prefill(self, tokens: Sequence[int]) -> int:
        self._cache.append_tokens(np.asarray(tokens, dtype=np.int32))
        return int(np.asarray(self._cache.get_logits()).reshape(-1)[-self.n_vocab :].argmax())

    def step(self, token: int) -> None:
        self._cache.append_tokens(np.asarray((token,), dtype=np.int32))

    def tokenize(self, text: str) -> list[int]:
        """See `Runtime.tokenize`; a BOS that the template wrote is not doubled."""
        ids = [int(token) for token in self._tokenizer.encode(text)]
        bos = self.tokenizer.bos
        return ids[1:] if bos and text.startswith(bos) and len(ids) > 1 and ids[0] == ids[1] else ids

    def file_tokens(self, text: str) -> list[int]:
        return self.tokenizer.tokens(text)

    def renderings(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        return [Rendered.by(self.facts.runtime, self._applied, conversations)]

    def _applied(self, what: Conversation) -> str:
        tools = {"tools": json.dumps(list(what.tools))} if what.tools else {}
        return str(self._tokenizer.apply_chat_template(json.dumps(list(what.messages)), **tools))

    def _chat(self, conversations: list[list[dict[str, str]]], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        """Answer as in the runtime's own examples, whose tokenizer leaves the begin token to the template."""
        tokenizer = self._runtime.Tokenizer(self._model)
        try:
            prompts = [tokenizer.encode(self._applied(Conversation(one))) for one in conversations]
        except Exception as error:  # of the template
            raise InputError(f"{self.name}: the chat template does not render: {first_line(error)}") from error

        def decode(ids: list[int]) -> str:
            return "".join(map(tokenizer.create_stream().decode, ids))

        return [self._text(prompt, max_tokens, stop, decode) for prompt in prompts]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        generator = self._after(ids, 1)
        values: NDArray[np.float32] = np.array(generator.get_output("logits"), dtype=np.float32)
        values = values.reshape(-1, values.shape[-1])
        if len(values) == len(ids):
            return values
        # Some graphs give the last position only: then the text is read token by token.
        generator = self._after(ids[:1], len(ids))
        rows = [np.array(generator.get_output("logits"), dtype=np.float32).reshape(-1)]
        for token in ids[1:]:
            generator.append_tokens(np.array([token], dtype=np.int32))
            rows.append(np.array(generator.get_output("logits"), dtype=np.float32).reshape(-1))
        return np.stack(rows)

    def written(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        generator = self._after(prompt, max_tokens)
        for _ in range(max_tokens):
            if generator.is_done():
                return
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self.stop_tokens:
                return
            yield token

    def close(self) -> None:
        """Free the memory; the model cannot be used afterwards."""
        for name in ("_cache", "_tokenizer", "_model"):
            vars(self).pop(name, None)

    def _after(self, ids: Sequence[int], n_more: int) -> Any:
        """Return a generator that has read `ids` and has room for `n_more` tokens."""
        generator = self._generator(min(len(ids) + n_more, self.context_tokens))
        try:
            generator.append_tokens(np.array(ids, dtype=np.int32))
        except Exception as error:
            raise EngineError(f"onnxruntime-genai failed: {first_line(error)}", "The model may be broken.") from error
        return generator

    def _generator(self, max_length: int) -> Any:
        params = self._runtime.GeneratorParams(self._model)
        try:
            params.set_search_options(max_length=max_length, do_sample=False, repetition_penalty=1.0)
            return self._runtime.Generator(self._model, params)
        except Exception as error:
            problem = f"onnxruntime-genai cannot use this folder: {first_line(error)}"
            raise EngineError(problem, "Its genai_config.json or its graph may be broken.") from error

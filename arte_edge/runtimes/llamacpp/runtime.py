"""A GGUF file in llama.cpp, one text at a time: what a benchmark times, and what the gate reads and compares.

The context that is timed is the one that llama-bench makes: batches of 2048 and 512, keys and values in F16,
flash attention as llama.cpp decides, weights mapped. The calls are llama.cpp's own, one decode a token, the
arrays filled beforehand: what Python adds to a token is a few microseconds.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import EngineError, InputError, first_line
from arte_edge.gguf.reader import read_model_header
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.llamacpp.bindings import ONE_SEQUENCE, LlamaContext, Row, flash_attn_in_use
from arte_edge.runtimes.llamacpp.engine import LlamaCppEngine
from arte_edge.runtimes.llamacpp.servers import served
from arte_edge.runtimes.llamacpp.xllamacpp import server_rendering
from arte_edge.runtimes.prompt_render import Conversation, Message, render
from arte_edge.runtimes.protocol import BaseRuntime, Rendered, RuntimeFacts, Served, readable, until_stop

_N_BATCH, _N_UBATCH = 2048, 512
_FLASH_AUTO = -1  # llama.h: LLAMA_FLASH_ATTN_TYPE_AUTO
# ggml.h: enum ggml_type
_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
_CHUNK = 128  # rows of logits at once: with a vocabulary of 262,144 they are 134 MB
_CTX_STEP = 256  # tokens; contexts grow in steps, so that few are made
_PARALLEL = 16
_CHAT_TOKENS = 2048  # of context for a conversation; the file is opened again for longer ones
_CONTROL, _USER_DEFINED = 1 << 3, 1 << 4  # llama.cpp: LLAMA_TOKEN_ATTR_*
_ADDED = _CONTROL | _USER_DEFINED
_NORMAL = 1  # GGUF: tokenizer.ggml.token_type of an ordinary token


# Of a file with exactly ChatML's, Llama 3's or Mistral's template, which llama.cpp itself renders as in training.
_OWN_FORMATTER = (
    "llama-cpp-python puts a formatter of its own, which differs, in place of this well-known template: pass "
    "chat_format='chat_template.default' or a chat_handler to llama_cpp.Llama, or use llama.cpp's server"
)


class _Prompt(Exception):
    """Carries the prompt that a chat handler would decode."""


class _Catcher:
    """Stands for `llama_cpp.Llama` where a chat handler hands over the prompt that it has made."""

    def tokenize(self, text: bytes, **_: Any) -> None:
        raise _Prompt(text.decode())


class LlamaCppRuntime(BaseRuntime):
    """`Runtime` of one GGUF file."""

    def __init__(
        self, path: Path, threads: int | None = None, context_tokens: int = 0, type_k: str = "f16", type_v: str = "f16"
    ) -> None:
        """Check the file's header and load it.

        Args:
            context_tokens: room in the cache, which is made at once; 0: the model's own limit, made when needed.
            type_k: type of the cached keys of `prefill` and `step`.
            type_v: of the cached values.

        Raises InputError: not a GGUF, cut short, or one that llama.cpp does not load;
        EngineError: llama.cpp is not installed, or makes no such context.
        """
        # A file cut short would end in a crash inside the runtime.
        self._header = header = read_model_header(path)
        self._path, self.name, self.quantization = path, path.name, header.quantization
        self._engine = LlamaCppEngine(
            path, sha256="", quantization=header.quantization, parallel=_PARALLEL, threads=threads
        )
        self._types = type_k, type_v
        self._flash_attn: bool | None = None
        self._model = self._engine.model
        self._reading: LlamaContext | None = None
        self._llama: Any = None  # llama_cpp.Llama, for `chat`
        self.chat_template = self._engine.chat_template
        self.special_tokens = self._engine.special_tokens
        self.n_vocab = self._model.n_vocab
        self.context_tokens: int = context_tokens or self._model.n_ctx_train
        eos = int(self._model.lib.llama_vocab_eos(self._model.vocab))
        self.eos_tokens = frozenset([eos] if eos >= 0 else [])
        self._cache: Any = None  # the context of `prefill` and `step`
        if context_tokens:  # made before anything is timed
            try:
                self._open_cache()
            except EngineError:
                self.close()
                raise

    @cached_property
    def facts(self) -> RuntimeFacts:
        lib, vocab = self._model.lib, self._model.vocab
        bos = lib.llama_vocab_bos(vocab)
        buffers = self._model.buffers_mib
        return RuntimeFacts(
            runtime=self._engine.identity.runtime,
            build=lib.llama_print_system_info().decode(errors="replace").strip(" |\n"),
            n_batch=_N_BATCH,
            n_ubatch=_N_UBATCH,
            type_k=self._types[0],
            type_v=self._types[1],
            flash_attn=self._flash_attn,
            use_mmap=any("Mapped" in name for name in buffers) if buffers else None,
            bos=bos if bos >= 0 and lib.llama_vocab_get_add_bos(vocab) else None,
            notes=tuple(f"weights in {name}: {size} MiB" for name, size in buffers.items()),
        )

    def _open_cache(self) -> None:
        """Make a context of one sequence as llama-bench does, and a batch whose arrays are reused."""
        self._lib = lib = self._model.lib
        type_k, type_v = self._types
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self.context_tokens, _N_BATCH, _N_UBATCH
        params.n_threads = params.n_threads_batch = self._engine.threads
        params.flash_attn_type = _FLASH_AUTO
        params.swa_full = False
        params.type_k, params.type_v = _TYPES[type_k], _TYPES[type_v]
        self._cache = lib.llama_init_from_model(self._model.handle, params)
        if not self._cache:
            raise EngineError(
                f"llama.cpp makes no context of {self.context_tokens} tokens with keys in {type_k} and values in "
                f"{type_v}",
                "There is too little memory for it, or the model does not support these types.",
            )
        self._flash_attn = flash_attn_in_use()
        self._memory = lib.llama_get_memory(self._cache)
        self._batch = lib.llama_batch_init(_N_BATCH, 0, 1)
        for i in range(_N_BATCH):
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = 0
            self._batch.logits[i] = 0
        self._used = 0

    def clear(self) -> None:
        if self._cache is None:
            self._open_cache()
        self._lib.llama_memory_clear(self._memory, False)
        self._used = 0

    def prefill(self, tokens: Sequence[int]) -> int:
        """See `Decoder.prefill`. (InputError: nothing to read, or more than the cache has room for.)"""
        if self._cache is None:
            self._open_cache()
        n, room = len(tokens), self.context_tokens - self._used
        if not 0 < n <= room:
            raise InputError(f"{n} tokens to read, and the context has room for {room}")
        batch = self._batch
        for start in range(0, n, _N_BATCH):
            part = tokens[start : start + _N_BATCH]
            size = len(part)
            ctypes.memmove(batch.token, (ctypes.c_int32 * size)(*part), 4 * size)
            first = self._used
            ctypes.memmove(batch.pos, (ctypes.c_int32 * size)(*range(first, first + size)), 4 * size)
            batch.logits[size - 1] = 1  # as llama-bench: of each batch's last token
            batch.n_tokens = size
            self._decode(size)
            batch.logits[size - 1] = 0
        logits = self._lib.llama_get_logits_ith(self._cache, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.n_vocab,)).argmax())

    def step(self, token: int) -> None:
        batch = self._batch
        batch.token[0] = token
        batch.pos[0] = self._used
        batch.logits[0] = 1
        batch.n_tokens = 1
        self._decode(1)
        batch.logits[0] = 0

    def _decode(self, n_tokens: int) -> None:
        status = self._lib.llama_decode(self._cache, self._batch)
        if status != 0:
            raise EngineError(f"llama_decode returned {status} for {n_tokens} tokens", "The context may be full.")
        self._lib.llama_synchronize(self._cache)
        self._used += n_tokens

    def _of_kind(self, attributes: int) -> list[int]:
        lib, vocab = self._model.lib, self._model.vocab
        return [i for i in range(self.n_vocab) if lib.llama_vocab_get_attr(vocab, i) & attributes]

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset(token for token in range(self.n_vocab) if self._model.is_end(token))

    @cached_property
    def added_tokens(self) -> tuple[str, ...]:
        return tuple(text for token in self._of_kind(_ADDED) if (text := self.token_text(token)))

    def tokenize(self, text: str) -> list[int]:
        return self._model.tokens(text)

    def renderings(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        """See `Runtime.renderings`: llama-cpp-python's `create_chat_completion`, and llama.cpp's server."""
        from llama_cpp import llama_chat_format

        template = self.chat_template or ""
        own = llama_chat_format.guess_chat_format_from_gguf_metadata({"tokenizer.chat_template": template})
        program = self.facts.runtime.replace("llama_cpp", "llama-cpp-python")
        program += f" as '{own}'" if own else ""
        begin, end = self.special_tokens["bos_token"], self.special_tokens["eos_token"]

        def render(what: Conversation) -> str:
            try:
                handler(llama=_Catcher(), messages=what.messages, tools=what.tools)
            except _Prompt as prompt:
                return str(prompt)
            raise EngineError("no prompt was made")

        try:
            if own:
                handler = llama_chat_format.get_chat_completion_handler(own)
            else:
                handler = llama_chat_format.Jinja2ChatFormatter(template, end, begin).to_chat_handler()
            python = Rendered.by(program, render, conversations)
        except Exception as error:  # as llama_cpp.Llama raises it when it opens the file
            python = Rendered(program, refusal=first_line(error))
        if own and self.facts.bos is not None:
            python = replace(python, begin=begin)  # its own formatters leave the begin token to the tokenizer
        if own:
            python = replace(python, instead=_OWN_FORMATTER)
        return [python, *server_rendering(self._path, conversations)]

    def token_text(self, token: int) -> str:
        if not 0 <= token < self.n_vocab:
            return f"[{token}]"
        return self._model.piece(token, special=True).decode(errors="replace")

    def file_tokens(self, text: str) -> list[int] | None:
        """See `Runtime.file_tokens`; None unless `text` holds a token that llama.cpp made special by its name.

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
        kinds = field.value if field is not None and isinstance(field.value, list) else []
        return frozenset(
            self.token_text(token)
            for token in self._of_kind(_CONTROL)
            if token < len(kinds) and kinds[token] == _NORMAL
        )

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        ids = self._of_kind(_ADDED)
        return {text: token for token in ids if (text := self.token_text(token)) not in self._promoted}

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self._special_ids), key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)")

    def vocabulary(self) -> list[str]:
        # Control tokens have no text.
        return readable(self._model.piece(i).decode(errors="replace") for i in range(self.n_vocab))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        if (unknown := max(ids, default=0)) >= self.n_vocab:
            raise InputError(f"{self.name}: token {unknown} is not among its {self.n_vocab} tokens")
        context = self._context_for(len(ids))
        context.clear()
        rows = [Row(token, position, 0, output=True) for position, token in enumerate(ids)]
        values = np.empty((len(rows), self.n_vocab), dtype=np.float32)
        for start in range(0, len(rows), _CHUNK):
            values[start : start + _CHUNK] = context.decode(rows[start : start + _CHUNK])
        return values

    def _context_for(self, n_token: int) -> LlamaContext:
        if self._reading is None or self._reading.n_ctx_seq < n_token:
            self._drop_context()
            size = -(-n_token // _CTX_STEP) * _CTX_STEP
            self._reading = LlamaContext(self._model, 1, size, self._engine.threads, layout=ONE_SEQUENCE)
        return self._reading

    def _drop_context(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _generate(self, prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        sampling = Sampling(max_tokens=max_tokens, stop=stop)
        return [done.text for done in self._engine.complete([Request(p) for p in prompts], sampling)]

    def _chat(self, conversations: list[list[dict[str, str]]], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        return [self._answer(messages, max_tokens, stop) for messages in conversations]

    def _answer(self, messages: list[dict[str, str]], max_tokens: int, stop: tuple[str, ...], grammar: str = "") -> str:
        """Return what `create_chat_completion` writes, ended at a stop string, which that itself would leave out."""
        from llama_cpp import LlamaGrammar

        llama, text = self._opened(self._room([messages], max_tokens)), ""
        bound = LlamaGrammar.from_string(grammar, verbose=False) if grammar else None
        try:
            answer = llama.create_chat_completion(
                messages, max_tokens=max_tokens, temperature=0.0, stream=True, grammar=bound
            )
            for part in answer:
                text += part["choices"][0]["delta"].get("content") or ""
                if (whole := until_stop(text, stop)) is not None:
                    return whole
        except ValueError:  # as for its users: more tokens than the model was made for
            return ""
        return text

    def _room(self, conversations: Sequence[Sequence[Message]], max_tokens: int) -> int:
        """Return the tokens of context that the longest conversation and its answer need."""
        longest = max(len(self.tokenize(self.render(messages) or "")) for messages in conversations)
        return min(max(longest + max_tokens + 1, _CHAT_TOKENS), self._model.n_ctx_train)

    def _opened(self, n_ctx: int) -> Any:
        """Return the file as a user of llama-cpp-python opens it."""
        from llama_cpp import Llama

        if self._llama is None or self._llama.n_ctx() < n_ctx:
            if self._llama is not None:
                self._llama.close()
            threads = {"n_threads": self._engine.threads, "n_threads_batch": self._engine.threads}
            self._llama = Llama(str(self._path), n_ctx=n_ctx, verbose=False, **threads)
        return self._llama

    def served(
        self, conversations: Sequence[Sequence[Message]], max_tokens: int, stop: Sequence[str] = ()
    ) -> list[Served]:
        room = self._room(conversations, max_tokens)
        return served(self._path, conversations, max_tokens, stop, room, self._engine.threads)

    def constrained(self, messages: Sequence[Message], grammar: str, max_tokens: int, stop: Sequence[str] = ()) -> str:
        if self.chat_template is not None:
            return self._answer([dict(message) for message in messages], max_tokens, tuple(stop), grammar)
        sampling = Sampling(max_tokens=max_tokens, stop=tuple(stop), grammar=grammar)
        done = self._engine.complete([Request(render(self, messages))], sampling)[0]
        if done.error:
            raise EngineError(f"{self.name}: {done.error}")
        return done.text

    def close(self) -> None:
        if self._llama is not None:
            self._llama.close()
            self._llama = None
        if self._cache:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._cache)
            self._cache = None
        self._drop_context()
        self._engine.close()

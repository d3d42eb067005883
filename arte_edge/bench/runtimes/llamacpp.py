"""GGUF under the clock through llama-cpp-python, with the context that llama-bench makes.

The calls are llama.cpp's own, one decode a token, arrays filled beforehand: what Python adds to a
token is a few microseconds. Defaults are llama-bench's: batches of 2048 and 512, keys and values in
F16, flash attention as llama.cpp decides, weights mapped.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from arte_edge.bench.runtime import RuntimeFacts
from arte_edge.errors import EngineError, InputError
from arte_edge.gguf.reader import read_model_header
from arte_edge.runtimes.llamacpp.bindings import LlamaModel

__all__ = ["LlamaSpeedModel", "load_llama_cpp"]

_N_BATCH, _N_UBATCH = 2048, 512
_FLASH_AUTO = -1  # llama.h: LLAMA_FLASH_ATTN_TYPE_AUTO
# ggml.h: enum ggml_type
_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}
_BUFFER = re.compile(rb"(\S+) model buffer size\s*=\s*([\d.]+) MiB")
_FLASH = re.compile(
    rb"Flash Attention (?:was auto, |not supported, )?(?:set to )?(enabled|disabled)"
    rb"|flash_attn\s*=\s*(enabled|disabled)"
)
_log: Any = None  # llama.cpp keeps a pointer to it


def load_llama_cpp() -> Any:
    """Import llama-cpp-python and return it.

    Raises:
        EngineError: it is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise EngineError(
            "llama-cpp-python is not installed",
            "pip install 'arte-edge[gguf]', or 'arte-edge[xllamacpp]' where that would have to compile (ARM).",
        ) from error
    return llama_cpp


class LlamaSpeedModel:
    """`SpeedModel` of one GGUF file."""

    def __init__(
        self, path: Path, threads: int, context_tokens: int, type_k: str = "f16", type_v: str = "f16"
    ) -> None:
        """Load the file and make an empty cache.

        Raises:
            InputError: not a GGUF, cut short, or one that llama.cpp does not load.
            EngineError: llama-cpp-python is not installed, or makes no such context.
        """
        read_model_header(path)  # a file cut short would end in a crash inside the runtime
        lib: Any = load_llama_cpp()
        self._heard: dict[str, str] = {}
        self._lib = lib
        self._listen()
        self._model = LlamaModel(path, lib)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context_tokens, _N_BATCH, _N_UBATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = _FLASH_AUTO
        params.swa_full = False
        params.type_k, params.type_v = _TYPES[type_k], _TYPES[type_v]
        self._types = type_k, type_v
        self._context = lib.llama_init_from_model(self._model.handle, params)
        if not self._context:
            self._model.close()
            raise EngineError(
                f"llama.cpp makes no context of {context_tokens} tokens with keys in {type_k} and values in {type_v}",
                "There is too little memory for it, or the model does not take these types.",
            )
        self._memory = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_init(_N_BATCH, 0, 1)
        for i in range(_N_BATCH):
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = 0
            self._batch.logits[i] = 0
        self.n_vocab = self._model.n_vocab
        self.context_tokens = context_tokens
        self._used = 0

    @cached_property
    def facts(self) -> RuntimeFacts:
        lib, vocab = self._lib, self._model.vocab
        system = lib.llama_print_system_info().decode(errors="replace").strip(" |\n")
        bos = lib.llama_vocab_bos(vocab)
        return RuntimeFacts(
            runtime=f"llama_cpp {lib.__version__}",
            build_commit=_commit(),
            build=system,
            n_batch=_N_BATCH,
            n_ubatch=_N_UBATCH,
            type_k=self._types[0],
            type_v=self._types[1],
            flash_attn={"enabled": True, "disabled": False}.get(self._heard.get("flash", "")),
            use_mmap=any("Mapped" in name for name in self._heard) if len(self._heard) > 1 else None,
            bos=bos if bos >= 0 and lib.llama_vocab_get_add_bos(vocab) else None,
            notes=tuple(f"weights in {k}: {v} MiB" for k, v in self._heard.items() if k != "flash"),
        )

    def clear(self) -> None:
        self._lib.llama_memory_clear(self._memory, False)
        self._used = 0

    def read(self, tokens: Sequence[int]) -> int:
        """See `SpeedModel.read`.

        Raises:
            InputError: nothing to read, or more than the cache has room for.
        """
        n = len(tokens)
        if not 0 < n <= self.context_tokens - self._used:
            room = self.context_tokens - self._used
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
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.n_vocab,)).argmax())

    def step(self, token: int) -> None:
        """Append one token and compute the next logits, which nobody looks at while the clock runs."""
        batch = self._batch
        batch.token[0] = token
        batch.pos[0] = self._used
        batch.logits[0] = 1
        batch.n_tokens = 1
        self._decode(1)
        batch.logits[0] = 0

    def _decode(self, n_tokens: int) -> None:
        status = self._lib.llama_decode(self._context, self._batch)
        if status != 0:
            raise EngineError(
                f"llama_decode returned {status} for {n_tokens} tokens", "The context may be full."
            )
        self._lib.llama_synchronize(self._context)
        self._used += n_tokens

    def close(self) -> None:
        if self._context:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
            self._context = None
            self._model.close()

    def _listen(self) -> None:
        """Read from llama.cpp's log what it tells nowhere else, and keep the log from the screen."""
        global _log
        heard = self._heard

        def listen(level: int, text: bytes, user_data: Any) -> None:
            if found := _BUFFER.search(text):
                heard[found[1].decode(errors="replace")] = found[2].decode()
            elif found := _FLASH.search(text):
                heard["flash"] = (found[1] or found[2]).decode()

        self._lib.llama_backend_init()
        _log = self._lib.llama_log_callback(listen)
        self._lib.llama_log_set(_log, None)


def _commit() -> str:
    """Return the commit that GGML says it was built from, empty where it does not say."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    for path in sorted(folder.glob("*ggml-base*")):
        try:
            told = ctypes.CDLL(str(path)).ggml_commit
        except (OSError, AttributeError):
            continue
        told.restype = ctypes.c_char_p
        commit: str = (told() or b"").decode(errors="replace")
        return "" if commit == "unknown" else commit
    return ""

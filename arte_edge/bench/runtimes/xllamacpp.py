"""GGUF under the clock through xllamacpp, where llama-cpp-python has no wheel.

Single decodes of llama.cpp itself, as with llama-cpp-python, so that the two compare and every
token has a time of its own. The prebuilt Linux wheels are made for any CPU of their kind (AVX2 at
most on x86-64, plain armv8-a on ARM), so a llama.cpp compiled on the device may be faster: the
row's `build` says which features are in use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from arte_edge.bench.runtime import RuntimeFacts
from arte_edge.errors import EngineError, InputError
from arte_edge.models.gguf_header import read_header
from arte_edge.runtimes.llamacpp.bindings import LlamaContext, LlamaModel, Row
from arte_edge.runtimes.llamacpp.context_memory import ONE_SEQUENCE
from arte_edge.runtimes.llamacpp.xllama_library import XllamaLibrary, load_xllamacpp

__all__ = ["XllamaSpeedModel"]


class XllamaSpeedModel:
    """`SpeedModel` of one GGUF file."""

    def __init__(self, path: Path, threads: int, context_tokens: int) -> None:
        """Load the file and make an empty cache.

        Raises:
            InputError: not a GGUF, cut short, or one that llama.cpp does not load.
            EngineError: xllamacpp is not installed or of a version that we cannot use, or too little memory.
        """
        read_header(path)  # a file cut short would end in a crash inside the runtime
        try:
            self._library: XllamaLibrary = load_xllamacpp()
        except ImportError as error:
            raise EngineError("xllamacpp is not installed", "pip install 'arte-edge[xllamacpp]'") from error
        self._model = LlamaModel(path, self._library)
        try:
            self._context = LlamaContext(self._model, 1, context_tokens, threads, layout=ONE_SEQUENCE)
        except EngineError:
            self._model.close()
            raise
        self.n_vocab = self._model.n_vocab
        self.context_tokens = context_tokens
        self._used = 0
        self._buffers, self._flash_attn = dict(self._library.buffers_mib), self._library.flash_attn

    @cached_property
    def facts(self) -> RuntimeFacts:
        library, context = self._library, self._context.handle
        info = library.build_info
        system = library.llama_print_system_info().decode(errors="replace").strip(" |")
        return RuntimeFacts(
            runtime=f"xllamacpp {library.__version__}",
            build_commit=_commit(str(info.get("commit", "")), library.__version__),
            build=f"{system}; {info.get('compiler', '')} {info.get('build_target', '')}".strip("; "),
            n_batch=library.llama_n_batch(context),
            n_ubatch=library.llama_n_ubatch(context),
            type_k="f16",  # llama.cpp's default, which `LlamaContext` leaves
            type_v="f16",
            flash_attn=self._flash_attn,
            use_mmap=any(name.endswith("_Mapped") for name in self._buffers) if self._buffers else None,
            notes=tuple(f"weights in {name}: {size:g} MiB" for name, size in self._buffers.items()),
        )

    def clear(self) -> None:
        self._context.clear()
        self._used = 0

    def read(self, tokens: Sequence[int]) -> int:
        """See `SpeedModel.read`.

        Raises:
            InputError: nothing to read, or more than the cache has room for.
        """
        if not 0 < len(tokens) <= self.context_tokens - self._used:
            room = self.context_tokens - self._used
            raise InputError(f"{len(tokens)} tokens to read, and the context has room for {room}")
        last = len(tokens) - 1
        rows = [Row(token, self._used + i, 0, i == last) for i, token in enumerate(tokens)]
        for start in range(0, len(rows), self._context.n_batch):
            logits = self._context.decode(rows[start : start + self._context.n_batch])
        self._used += len(rows)
        return int(logits[-1].argmax())

    def step(self, token: int) -> int:
        return self.read((token,))

    def close(self) -> None:
        self._context.close()
        self._model.close()


def _commit(commit: str, version: str) -> str:
    """Return what the build says or, as its wheels say nothing, llama.cpp's build number.

    xllamacpp's versions are year.month.build: 2026.10.11549 holds llama.cpp b11549.
    """
    if commit not in ("", "unknown"):
        return commit
    found = re.match(r"20\d\d\.\d+\.(\d+)", version)
    return f"b{found[1]}" if found else ""

"""llama.cpp's low-level calls as three small Python objects: a model, a context, a grammar.

Everything that touches a pointer is here, so that the scheduler above it reads as an algorithm. The high-level API of
llama-cpp-python decodes one sequence at a time; the calls below decode many together. llama.cpp's batch is six C
arrays, which numpy views in place, so that filling a batch is four copies whatever its length.

The KV cache is all that grows with the workload: sequences times tokens times bytes a token. Its size is known before
anything is allocated, so a context that cannot fit is an error message and not a killed process. It does not depend
on the number of prompts: they queue for the sequences there are.

Notation: n_row rows (tokens) in one decode, v vocabulary size.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import EngineError, InputError
from arte_edge.machine import available_bytes

_F16_BYTES, _F32_BYTES = 2, 4
_KEPT_FREE = 0.05  # of the available memory


@dataclass(frozen=True)
class Layout:
    """Settings of a context; the generated text depends on them only by rounding.

    * `unified`: one cache for all sequences. Copying a prefix is free and a batch needs no
      splitting, but attention covers every cell of every sequence. Split (the default): a
      cache for each, copied whole.
    * `flash`: attention without the matrix of scores in memory. llama.cpp computes it in tiles where a
      sequence has 64 rows or more in a batch, otherwise row by row, which is slow: off by default.
    * `ubatch`: rows that llama.cpp multiplies at once.
    """

    unified: bool = False
    flash: bool = False
    ubatch: int = 512


DEFAULT_LAYOUT = Layout()
ONE_SEQUENCE = Layout(flash=True)  # llama.cpp's own choice for one sequence, whose prompts fill tiles


def context_bytes(model: Any, n_seq: int, n_ctx_seq: int, ubatch: int) -> int:
    """Return what a context of `n_seq` sequences with `n_ctx_seq` tokens each allocates, in bytes, about.

    Keys and values (16 bits), logits of one row a sequence, and the activations of one `ubatch`: the widest tensor,
    which is logits or the feed-forward layer's, twice, and twice the attention scores of its rows, which flash
    attention does without. For models with layers that remember less than the whole context it is an upper bound.
    """
    logits = n_seq * model.n_vocab * _F32_BYTES
    widest = max(model.n_vocab // 2, model.size("embedding_length") * 4, model.size("feed_forward_length"))
    activations = 2 * ubatch * widest * _F32_BYTES
    scores = 2 * ubatch * n_ctx_seq * max(model.size("attention.head_count"), 1) * _F32_BYTES
    return int(n_seq * n_ctx_seq * kv_bytes_per_token(model) + logits + activations + scores)


def kv_bytes_per_token(model: Any) -> int:
    """Return the bytes that one token of one sequence takes in the cache."""
    heads = model.size("attention.head_count") or 1
    width = model.size("embedding_length") // heads
    key = model.size("attention.key_length") or width
    value = model.size("attention.value_length") or width
    kv_heads = model.size("attention.head_count_kv") or heads
    return int(model.size("block_count") * kv_heads * (key + value) * _F16_BYTES)


def check_cells_fit(model: Any, cells: int, n_seq: int, ubatch: int) -> None:
    """Raise if a unified context of `cells` tokens does not fit into the available memory.

    Raises EngineError: it does not fit.
    """
    room = int(available_bytes() * (1 - _KEPT_FREE))
    need = context_bytes(model, 1, cells, ubatch) + (n_seq - 1) * model.n_vocab * _F32_BYTES
    if need > room:
        size = f"scoring {cells} tokens at once needs {need / 1e9:.1f} GB, {room / 1e9:.1f} GB are free"
        raise EngineError(f"{model.path.name}: {size}", "Shorten the prompts, or take a smaller model.")


def check_fits(model: Any, n_seq: int, spare: int, n_ctx_seq: int, ubatch: int) -> None:
    """Raise if a context does not fit into the available memory.

    Args:
        n_seq: all sequences, of which `spare` hold prefixes and are needed for any value of `parallel`.

    Raises EngineError: it does not fit; the hint names the number of sequences that would.
    """
    room = int(available_bytes() * (1 - _KEPT_FREE))
    need = context_bytes(model, n_seq, n_ctx_seq, ubatch)
    if need <= room:
        return
    fitting = n_seq - spare
    while fitting > 0 and context_bytes(model, fitting + spare, n_ctx_seq, ubatch) > room:
        fitting -= 1
    size = f"{n_seq - spare} sequences of {n_ctx_seq} tokens need {need / 1e9:.1f} GB, {room / 1e9:.1f} GB are free"
    hint = f"parallel = {fitting} would fit." if fitting else "Not even one fits: shorten the prompts or the answers."
    raise EngineError(f"{model.path.name}: {size}", hint)


class RowBatch:
    """Room for `capacity` rows, each of one sequence or of several."""

    def __init__(self, lib: Any, capacity: int) -> None:
        self.capacity = capacity
        self.handle = lib.llama_batch_init(capacity, 0, 1)
        self._lib = lib
        self._token = _view(self.handle.token, capacity, ctypes.c_int32)
        self._position = _view(self.handle.pos, capacity, ctypes.c_int32)
        self._output = _view(self.handle.logits, capacity, ctypes.c_int8)
        self._count = _view(self.handle.n_seq_id, capacity, ctypes.c_int32)
        # Each row's list of sequences has a memory of its own; ours are parts of the caller's array.
        self._lists = _view(self.handle.seq_id, capacity, ctypes.c_size_t)
        self._theirs = self._lists.copy()
        self._sequences: NDArray[np.int32] | None = None  # kept alive while llama.cpp reads it

    def fill(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        output: NDArray[np.int8],
        counts: NDArray[np.int32] | None = None,
    ) -> Any:
        """Set the rows (all ``[n_row]``) and return the C batch, which the next `fill` overwrites.

        With `counts` ``[n_row]`` a row belongs to so many sequences, one after the other in
        `sequences` ``[counts.sum()]``; without, to one.
        """
        n = len(tokens)
        if n > self.capacity:
            raise ValueError(f"{n} rows exceed the batch's {self.capacity}")
        self._token[:n], self._position[:n] = tokens, positions
        self._output[:n], self._count[:n] = output, 1 if counts is None else counts
        self._sequences = held = np.ascontiguousarray(sequences, dtype=np.int32)
        first = np.arange(n) if counts is None else np.cumsum(counts) - counts
        self._lists[:n] = held.ctypes.data + held.itemsize * first
        self.handle.n_tokens = n
        return self.handle

    def close(self) -> None:
        """Give the memory back; the object cannot be used afterwards."""
        self._lists[:] = self._theirs  # llama.cpp frees what it made
        self._lib.llama_batch_free(self.handle)


def _view(pointer: Any, n: int, kind: Any) -> NDArray[Any]:
    """Return the C array at `pointer` as ``[n]``, in place."""
    address = ctypes.cast(pointer, ctypes.POINTER(kind))
    return np.ctypeslib.as_array(address, shape=(n,))


def model_params(lib: Any) -> Any:
    """Return llama.cpp's default parameters of a model, changed so that loading it is safe here."""
    params = lib.llama_model_default_params()
    if b"AMX_INT8 = 1" in lib.llama_print_system_info() and hasattr(params, "use_extra_bufts"):
        params.use_extra_bufts = False
    return params


N_BATCH = 2048  # rows of one decode
_INSTALL = "pip install 'arte-edge[gguf]'; to measure on ARM without compiling: 'arte-edge[xllamacpp]'."
_BUFFER = re.compile(rb"(\S+) model buffer size\s*=\s*([\d.]+) MiB")
_FLASH = re.compile(
    rb"Flash Attention (?:was auto, |not supported, )?(?:set to )?(enabled|disabled)"
    rb"|flash_attn\s*=\s*(enabled|disabled)"
)
_heard: dict[str, str] = {}  # from the log of the model and the context that were made last
_log_callback: Any = None  # llama.cpp keeps a pointer to it, so it must outlive every model


def _listen(level: int, text: bytes, user_data: int) -> None:
    """Take from one line of llama.cpp's log what it says nowhere else, and keep it from the screen."""
    if found := _BUFFER.search(text):
        _heard[found[1].decode(errors="replace")] = found[2].decode()
    elif found := _FLASH.search(text):
        _heard["flash_attn"] = (found[1] or found[2]).decode()


def flash_attn_in_use() -> bool | None:
    """Return whether the context that was made last uses flash attention, None where the log does not say."""
    return {"enabled": True, "disabled": False}.get(_heard.get("flash_attn", ""))


def load_llama_cpp() -> Any:
    """Return llama-cpp-python's llama.cpp, its log read and not printed: it would bury the progress lines.

    Raises EngineError: it is not installed.
    """
    global _log_callback
    try:
        import llama_cpp
    except ImportError as error:
        raise EngineError("Running GGUF models needs llama-cpp-python", _INSTALL) from error
    if _log_callback is None:
        _log_callback = llama_cpp.llama_log_callback(_listen)
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_log_callback, None)
    return llama_cpp


@dataclass(frozen=True)
class Row:
    """One token of a decode: where it stands, whose it is, and whether its logits are computed."""

    token: int
    position: int
    sequence: int
    output: bool = False


class LlamaModel:
    """Weights and vocabulary of one GGUF file, or the vocabulary alone, which is all that a grammar needs."""

    def __init__(self, path: Path, *, vocabulary_only: bool = False) -> None:
        self.lib = load_llama_cpp()
        self.path = path
        self.widened = False  # whether the weights are a float32 copy of those in the file
        _heard.clear()
        params = model_params(self.lib)
        params.vocab_only = vocabulary_only
        self.handle = self.lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise InputError(
                f"{path}: llama.cpp {self.lib.__version__} cannot load this file",
                "It may be truncated or of a newer model family: check its sha256, or update llama-cpp-python.",
            )
        self.buffers_mib = dict(_heard)  # where the weights went: CPU_Mapped is the file itself
        self.vocab = self.lib.llama_model_get_vocab(self.handle)
        self.n_vocab: int = self.lib.llama_vocab_n_tokens(self.vocab)
        self.n_ctx_train: int = self.lib.llama_model_n_ctx_train(self.handle)
        self._pieces: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {}

    def tokens(self, text: str) -> list[int]:
        """Return the ids of `text`, special tokens parsed, BOS in front if the model wants one and has none."""
        raw = text.encode()
        buffer = (ctypes.c_int32 * (len(raw) + 16))()
        n = self.lib.llama_tokenize(self.vocab, raw, len(raw), buffer, len(buffer), True, True)
        ids = list(buffer[:n])
        bos = self.lib.llama_vocab_bos(self.vocab)
        # A chat template that writes BOS itself would otherwise give two.
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == bos else ids

    def piece(self, token: int, special: bool = False) -> bytes:
        """Return the bytes of one token; control tokens are empty unless `special`."""
        if not special and token in self._pieces:
            return self._pieces[token]
        buffer = ctypes.create_string_buffer(256)
        n = self.lib.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        text = bytes(buffer.raw[: max(n, 0)])
        if not special:
            self._pieces[token] = text
        return text

    def is_end(self, token: int) -> bool:
        """Return whether the token ends generation (EOS, end of turn and their like)."""
        if token not in self._ends:
            self._ends[token] = bool(self.lib.llama_vocab_is_eog(self.vocab, token))
        return self._ends[token]

    def special(self, name: str) -> str:
        """Return the text of the ``bos`` or ``eos`` token, empty if the model has none."""
        token = getattr(self.lib, f"llama_vocab_{name}")(self.vocab)
        return self.piece(token, special=True).decode(errors="replace") if token >= 0 else ""

    def metadata(self, key: str) -> str | None:
        """Return one metadata value of the GGUF as text."""
        buffer = ctypes.create_string_buffer(1 << 20)
        n = self.lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if n >= 0 else None

    def size(self, *keys: str) -> int:
        """Return the first number that the file has under one of `keys` (without the family's name), else 0.

        Where a value differs from layer to layer, the file holds a list, which counts as none.
        """
        family = self.metadata("general.architecture") or ""
        found = (self.metadata(f"{family}.{key}") for key in keys)
        return next((int(value) for value in found if value and value.isdigit()), 0)

    @property
    def can_rewind(self) -> bool:
        """Return whether the last tokens of a sequence can be taken back (not where a state is kept instead)."""
        return not self.size("ssm.state_size", "wkv.head_size", "ssm.inner_size", "shortconv.l_cache")

    def close(self) -> None:
        if self.handle:
            self.lib.llama_model_free(self.handle)
            self.handle = None


class LlamaContext:
    """A KV cache of `n_seq` sequences with `n_ctx_seq` tokens each, and the decode call.

    In a unified layout the sequences share all of it, or `cells` tokens where that is given.
    """

    def __init__(
        self,
        model: LlamaModel,
        n_seq: int,
        n_ctx_seq: int,
        threads: int,
        adapter: Path | None = None,
        layout: Layout = DEFAULT_LAYOUT,
        cells: int = 0,
    ) -> None:
        lib = model.lib
        params = lib.llama_context_default_params()
        params.n_ctx = cells or n_seq * n_ctx_seq
        params.n_batch, params.n_ubatch, params.n_seq_max = N_BATCH, layout.ubatch, n_seq
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(layout.flash)
        if layout.unified:
            params.kv_unified = True
        self.model, self.lib, self.n_seq, self.n_ctx_seq = model, lib, n_seq, n_ctx_seq
        self.n_batch, self.layout, self.n_cells = N_BATCH, layout, params.n_ctx
        self.handle = lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise EngineError(
                f"No memory for {n_seq} sequences of {n_ctx_seq} tokens", "Lower the engine's `parallel`."
            )
        self._memory = lib.llama_get_memory(self.handle)
        self._batch = RowBatch(lib, N_BATCH)
        self._adapter = None
        if adapter is not None:
            self._adapter = lib.llama_adapter_lora_init(model.handle, os.fsencode(adapter))
            if not self._adapter:
                raise InputError(f"{adapter}: not a LoRA adapter of {model.path.name}")
            adapters = (lib.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            scales = (ctypes.c_float * 1)(1.0)
            lib.llama_set_adapters_lora(self.handle, adapters, 1, scales)

    def decode(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Decode up to `n_batch` rows; return the logits ``[n_output, v]`` of the rows marked as output, in order.

        The array is a view that the next decode overwrites.
        """
        table = np.array([(r.token, r.position, r.sequence, r.output) for r in rows], dtype=np.int32)
        tokens, positions, sequences, output = table.reshape(-1, 4).T
        return self.decode_arrays(tokens, positions, sequences, output.astype(np.int8))

    def decode_arrays(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        output: NDArray[np.int8],
        counts: NDArray[np.int32] | None = None,
    ) -> NDArray[np.float32]:
        """`decode` for rows that are arrays ``[n_row]`` already; `counts` as in `RowBatch.fill`.

        In a split cache the rows of neighbouring sequences are multiplied together only if they
        come in the order of their sequences (llama.cpp's `llama_batch_allocr::split_equal`).
        """
        batch = self._batch.fill(tokens, positions, sequences, output, counts)
        status = self.lib.llama_decode(self.handle, batch)
        if status != 0:
            raise EngineError(
                f"llama_decode returned {status} for {len(tokens)} tokens", "Lower the engine's `parallel`."
            )
        n_output = int(np.count_nonzero(output))
        if n_output == 0:
            return np.empty((0, self.model.n_vocab), dtype=np.float32)
        logits = self.lib.llama_get_logits(self.handle)
        return np.ctypeslib.as_array(logits, shape=(n_output, self.model.n_vocab))

    def copy(self, source: int, target: int) -> None:
        self.lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def clear(self) -> None:
        """Forget every sequence, as if the context were new.

        Values stay in memory where no sequence looks: zeroing gigabytes takes longer than a short call.
        """
        self.lib.llama_memory_clear(self._memory, False)

    def drop(self, sequence: int, start: int = -1) -> None:
        """Forget a sequence, or its tokens from position `start` on."""
        self.lib.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def close(self) -> None:
        if self.handle:
            self._batch.close()
            self.lib.llama_free(self.handle)
            if self._adapter:
                self.lib.llama_adapter_lora_free(self._adapter)
            self.handle = None


class Grammar:
    """A GBNF grammar's state for one sequence."""

    def __init__(self, model: LlamaModel, source: str) -> None:
        self._lib = model.lib
        self._handle = self._lib.llama_sampler_init_grammar(model.vocab, source.encode(), b"root")
        if not self._handle:
            raise InputError(f"The grammar does not parse: {source[:80]!r}", "See llama.cpp's GBNF notes.")

    def mask(self, tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `logits` with -inf where the grammar forbids the token."""
        n = len(tokens)
        data = (self._lib.llama_token_data * n)()
        view = np.frombuffer(data, dtype=[("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
        view["id"], view["logit"] = tokens, logits
        candidates = self._lib.llama_token_data_array(data=data, size=n, selected=-1, sorted=False)
        self._lib.llama_sampler_apply(self._handle, ctypes.byref(candidates))
        return np.array(view["logit"])

    def accept(self, token: int) -> None:
        self._lib.llama_sampler_accept(self._handle, token)

    def close(self) -> None:
        if self._handle:
            self._lib.llama_sampler_free(self._handle)
            self._handle = None

    __del__ = close  # of a text that was interrupted

"""Layouts of a llama.cpp context, the memory each takes, and whether it is available.

The KV cache is all that grows with the workload: sequences times tokens times bytes a token. Its size is known before
anything is allocated, so a context that cannot fit is an error message and not a killed process. It does not depend
on the number of prompts: they queue for the sequences there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arte_edge.errors import EngineError
from arte_edge.memory import available_bytes

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

    Keys and values (16 bits), logits of one row a sequence, and the activations of one
    `ubatch`: the widest tensor, which is logits or the feed-forward layer's, twice, and twice
    the attention scores of its rows, which flash attention does without. For models with
    layers that remember less than the whole context it is an upper bound.
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
    hint = (
        f"parallel = {fitting} would fit."
        if fitting
        else "Not even one fits: shorten the prompts or the answers."
    )
    raise EngineError(f"{model.path.name}: {size}", hint)

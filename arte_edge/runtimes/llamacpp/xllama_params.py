"""Find the fields of llama.cpp's context parameters in a build whose header we do not have.

llama.cpp passes its parameters as structs by value, and adds fields to them from one month to the
next; a prebuilt library comes without the header that says where they are. The library itself
tells: `llama_context_default_params` fills the struct with values that are known, and the few
fields that we set stand out among them. If they do not, we refuse, because a number written to the
wrong place would be a wrong result or a crash.

A struct declared larger than it is does no harm: it is returned through a pointer to our memory,
and passed as the last argument, of which the callee reads as much as it knows (System V ABI for
x86-64, sections 3.2.3; AAPCS64, section 6.8: by reference).
"""

from __future__ import annotations

import ctypes
import struct
from itertools import pairwise
from typing import Any

__all__ = ["MEMORY_BYTES", "context_params_type", "find_fields"]

MEMORY_BYTES = 1024  # of every struct of parameters; llama.cpp's own have less than 200

# llama.h and ggml.h: what llama_context_default_params sets, the same since 2024
_HEAD = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1}
_THREADS = 4  # GGML_DEFAULT_N_THREADS
# rope_scaling_type, pooling_type, attention_type, flash_attn_type: "unspecified" or "auto"; then
# rope_freq_base and rope_freq_scale, both 0.0
_TYPES = (-1, -1, -1, -1, 0, 0)
# embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified
_FLAGS = bytes([0, 1, 1, 1, 1, 0])
_SEARCHED = 24  # words of 32 bits; the fields we set are among the first 14


def find_fields(default: bytes) -> dict[str, int] | None:
    """Return where each field that we set stands, in bytes; None if that is not certain.

    ``kv_unified`` is left out where only that is unknown: a context that needs it is refused later.

    Args:
        default: the memory of the struct that ``llama_context_default_params`` returned.
    """
    words = struct.unpack_from(f"<{_SEARCHED}i", default)
    if words[: len(_HEAD)] != tuple(_HEAD.values()):
        return None
    fields = {name: 4 * i for i, name in enumerate(_HEAD)}
    threads = [i for i in range(len(_HEAD), _SEARCHED - 1) if words[i : i + 2] == (_THREADS, _THREADS)]
    types = [i for i in range(len(_HEAD), _SEARCHED - 5) if words[i : i + 6] == _TYPES]
    # Between the two there may be the context's type, 0 by default, and nothing else.
    if len(threads) != 1 or len(types) != 1 or any(words[threads[0] + 2 : types[0]]):
        return None
    fields |= {
        "n_threads": 4 * threads[0],
        "n_threads_batch": 4 * threads[0] + 4,
        "flash_attn_type": 4 * types[0] + 12,
    }
    # The first such place: behind the struct's end the memory holds anything.
    flags = default.find(_FLAGS, 4 * types[0])
    return fields | ({"kv_unified": flags + 5} if flags > 0 and flags % 4 == 0 else {})


def context_params_type(fields: dict[str, int]) -> Any:
    """Return a ctypes struct of `MEMORY_BYTES` bytes with `fields` by name and the rest as it came."""
    layout: list[tuple[str, Any]] = []
    ordered = sorted(fields.items(), key=lambda item: item[1])
    for (name, at), (_, following) in pairwise([*ordered, ("", MEMORY_BYTES)]):
        kind: Any = ctypes.c_bool if name == "kv_unified" else ctypes.c_int32
        layout.append((name, kind))
        layout.append((f"after_{name}", ctypes.c_uint8 * (following - at - ctypes.sizeof(kind))))
    return type("llama_context_params", (ctypes.Structure,), {"_pack_": 1, "_fields_": layout})

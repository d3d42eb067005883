"""The structs and functions of llama.cpp's C interface that `llama_runtime` uses, for ctypes.

Source: ``include/llama.h`` of llama.cpp b11549, which xllamacpp 2026.10.11549 holds. The structs of
parameters are not here: see `xllama_params`.
"""

from __future__ import annotations

import ctypes
from typing import Any

from arte_edge.runtimes.llamacpp.xllama_params import MEMORY_BYTES

__all__ = ["FUNCTIONS", "Batch", "LogCallback", "ModelParams", "TokenData", "TokenDataArray"]

_ptr, _int, _bool, _text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p


class ModelParams(ctypes.Structure):
    """All defaults, never looked into."""

    _fields_ = (("memory", ctypes.c_uint8 * MEMORY_BYTES),)


class Batch(ctypes.Structure):
    """llama.h: llama_batch, with room to grow. The arrays hold one entry a token."""

    _fields_ = (
        ("n_tokens", _int),
        ("token", ctypes.POINTER(_int)),
        ("embd", _ptr),
        ("pos", ctypes.POINTER(_int)),
        ("n_seq_id", ctypes.POINTER(_int)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(_int))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
        ("memory", ctypes.c_uint8 * 200),
    )


class TokenData(ctypes.Structure):
    _fields_ = (("id", _int), ("logit", ctypes.c_float), ("p", ctypes.c_float))


class TokenDataArray(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.POINTER(TokenData)),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", _bool),
    )


LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, _text, _ptr)

# llama.h: name -> what it returns, what it takes
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_adapter_lora_free": (None, [_ptr]),
    "llama_adapter_lora_init": (_ptr, [_ptr, _text]),
    "llama_backend_init": (None, []),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (_int, [_ptr, Batch]),
    "llama_free": (None, [_ptr]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_ptr]),
    "llama_get_memory": (_ptr, [_ptr]),
    "llama_log_set": (None, [LogCallback, _ptr]),
    "llama_memory_clear": (None, [_ptr, _bool]),
    "llama_memory_seq_cp": (None, [_ptr, _int, _int, _int, _int]),
    "llama_memory_seq_rm": (_bool, [_ptr, _int, _int, _int]),
    "llama_model_default_params": (ModelParams, []),
    "llama_model_free": (None, [_ptr]),
    "llama_model_get_vocab": (_ptr, [_ptr]),
    "llama_model_meta_val_str": (_int, [_ptr, _text, _text, ctypes.c_size_t]),
    "llama_model_n_ctx_train": (_int, [_ptr]),
    "llama_n_batch": (ctypes.c_uint32, [_ptr]),
    "llama_n_ctx": (ctypes.c_uint32, [_ptr]),
    "llama_n_ctx_seq": (ctypes.c_uint32, [_ptr]),
    "llama_n_seq_max": (ctypes.c_uint32, [_ptr]),
    "llama_n_threads": (_int, [_ptr]),
    "llama_n_threads_batch": (_int, [_ptr]),
    "llama_n_ubatch": (ctypes.c_uint32, [_ptr]),
    "llama_print_system_info": (_text, []),
    "llama_sampler_accept": (None, [_ptr, _int]),
    "llama_sampler_apply": (None, [_ptr, ctypes.POINTER(TokenDataArray)]),
    "llama_sampler_free": (None, [_ptr]),
    "llama_sampler_init_grammar": (_ptr, [_ptr, _text, _text]),
    "llama_set_adapters_lora": (
        _int,
        [_ptr, ctypes.POINTER(_ptr), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)],
    ),
    "llama_token_to_piece": (_int, [_ptr, _int, _text, _int, _int, _bool]),
    "llama_tokenize": (_int, [_ptr, _text, _int, ctypes.POINTER(_int), _int, _bool, _bool]),
    "llama_vocab_bos": (_int, [_ptr]),
    "llama_vocab_eos": (_int, [_ptr]),
    "llama_vocab_get_attr": (_int, [_ptr, _int]),
    "llama_vocab_is_eog": (_bool, [_ptr, _int]),
    "llama_vocab_n_tokens": (_int, [_ptr]),
}

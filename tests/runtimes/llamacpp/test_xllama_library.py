"""xllamacpp's llama.cpp is used only where its structs are what we take them for."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.errors import EngineError, InputError
from arte_edge.runtimes.llamacpp import bindings as llama_runtime
from arte_edge.runtimes.llamacpp.xllama_abi import FUNCTIONS
from arte_edge.runtimes.llamacpp.xllama_library import XllamaLibrary
from arte_edge.runtimes.llamacpp.xllama_params import MEMORY_BYTES, context_params_type, find_fields
from arte_edge.verify import gguf_model

HEAD, THREADS, TYPES = (512, 2048, 512, 1), (4, 4), (-1, -1, -1, -1)
TAIL = (0, 0, *struct.unpack("<4i", struct.pack("<4f", -1, -1, 32, 1)), 0)


def defaults(*words: int) -> bytes:
    return struct.pack(f"<{len(words)}i", *words).ljust(MEMORY_BYTES, b"\0")


@given(st.lists(st.integers(-2, 3), max_size=5), st.booleans())
def test_fields_are_found_whatever_was_added_before_the_threads(added: list[int], with_type: bool) -> None:
    found = find_fields(defaults(*HEAD, *added, *THREADS, *[0] * with_type, *TYPES, *TAIL))
    at = 4 * (len(HEAD) + len(added))
    assert found == {
        "n_ctx": 0,
        "n_batch": 4,
        "n_ubatch": 8,
        "n_seq_max": 12,
        "n_threads": at,
        "n_threads_batch": at + 4,
        "flash_attn_type": at + 4 * (2 + with_type + 3),
    }


@given(st.integers(0, 6))
def test_the_flags_are_found_behind_what_was_added(n_added: int) -> None:
    words = (*HEAD, *THREADS, *TYPES, *TAIL, *[0] * n_added)
    flags = struct.pack("<6?", False, True, True, True, True, False)
    garbage = flags * 2  # the memory behind the struct
    found = find_fields((struct.pack(f"<{len(words)}i", *words) + flags + garbage).ljust(MEMORY_BYTES, b"\0"))
    assert found is not None
    assert found["kv_unified"] == 4 * len(words) + 5


@pytest.mark.parametrize(
    "words",
    [
        (0, 2048, 512, 1, *THREADS, *TYPES, *TAIL),  # another default in front
        (7, *HEAD, *THREADS, *TYPES, *TAIL),  # a new first field
        (*HEAD, 8, 8, *TYPES, *TAIL),  # another number of threads
        (*HEAD, *THREADS, *THREADS, *TYPES, *TAIL),  # two places that could be it
        (*HEAD, *THREADS, -1, *TYPES, *TAIL),  # one more type
        (*HEAD, *THREADS, *TYPES[1:], *TAIL),  # one less
        (*HEAD, *THREADS, 9, *TYPES, *TAIL),  # something unknown between
        (),
    ],
)
def test_other_defaults_are_not_guessed_at(words: tuple[int, ...]) -> None:
    assert find_fields(defaults(*words)) is None


@given(st.binary(min_size=MEMORY_BYTES, max_size=MEMORY_BYTES))
def test_any_memory_is_read_without_an_error(memory: bytes) -> None:
    find_fields(memory)


def test_setting_a_field_leaves_the_others_as_they_came() -> None:
    raw = defaults(*HEAD, 0, 0, 1, *THREADS, 0, *TYPES, *TAIL)
    fields = find_fields(raw)
    assert fields is not None
    params = context_params_type(fields).from_buffer_copy(raw)
    params.n_threads, params.flash_attn_type = 3, 1
    words = struct.unpack_from("<21i", bytes(params))
    assert words == (*HEAD, 0, 0, 1, 3, 4, 0, -1, -1, -1, 1, *TAIL)
    assert len(bytes(params)) == MEMORY_BYTES


def test_a_library_without_the_functions_is_refused() -> None:
    with pytest.raises(EngineError, match=r"xllamacpp 9\.9 exports no llama\.cpp"):
        XllamaLibrary(SimpleNamespace(), "9.9", {})


def test_a_context_other_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = XllamaLibrary.__new__(XllamaLibrary)
    library.__version__ = "9.9"
    freed = []
    got = {"n_ctx": 512, "n_ctx_seq": 512, "n_batch": 512, "n_ubatch": 512, "n_seq_max": 1}
    got |= {"n_threads": 2, "n_threads_batch": 2}
    for name in got:
        monkeypatch.setattr(library, f"llama_{name}", lambda handle, name=name: got[name], raising=False)
    monkeypatch.setattr(library, "_init", lambda model, params: 77, raising=False)
    monkeypatch.setattr(library, "llama_free", freed.append, raising=False)
    asked: Any = SimpleNamespace(
        n_ctx=512, n_batch=2048, n_ubatch=512, n_seq_max=1, n_threads=2, n_threads_batch=2
    )
    assert library.llama_init_from_model(1, asked) == 77
    asked.n_threads = 3
    with pytest.raises(EngineError, match="did not take n_threads as given"):
        library.llama_init_from_model(1, asked)
    asked.n_threads, asked.n_seq_max, asked.n_ctx = 2, 2, 1024
    got |= {"n_ctx": 1024, "n_ctx_seq": 1024, "n_batch": 1024, "n_seq_max": 2}  # one cache for both
    with pytest.raises(EngineError, match="did not take kv_unified as given"):
        library.llama_init_from_model(1, asked)
    asked.kv_unified = True
    assert library.llama_init_from_model(1, asked) == 77
    got["n_ctx_seq"] = 512
    with pytest.raises(EngineError, match="did not take kv_unified as given"):
        library.llama_init_from_model(1, asked)
    assert freed == [77, 77, 77]


@pytest.mark.parametrize("name", ["ollama", ""])
def test_an_unknown_runtime_is_an_input_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARTE_EDGE_GGUF_RUNTIME", name)
    with pytest.raises(InputError, match="ARTE_EDGE_GGUF_RUNTIME"):
        llama_runtime._library()


@pytest.mark.parametrize("chosen", ["auto", "llama-cpp-python", "xllamacpp"])
def test_without_either_package_both_are_named(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("not here")

    monkeypatch.setenv("ARTE_EDGE_GGUF_RUNTIME", chosen)
    monkeypatch.setattr(llama_runtime, "_llama_cpp", missing)
    monkeypatch.setattr(llama_runtime, "load_xllamacpp", missing)
    with pytest.raises(EngineError, match=r"arte-edge\[gguf\].*arte-edge\[xllamacpp\]"):
        llama_runtime._library()


def test_every_function_that_the_engine_calls_is_bound() -> None:
    called: set[str] = set()
    for path in Path(llama_runtime.__file__).parent.glob("llama*.py"):
        called |= set(re.findall(r"\blib\.(llama_\w+)", path.read_text()))
    called |= set(re.findall(r"\blib\.(llama_\w+)", Path(gguf_model.__file__).read_text()))
    assert len(called) > 15
    known = set(FUNCTIONS) | {name for name in dir(XllamaLibrary) if name.startswith("llama_")}
    assert called - known == {"llama_context_default_params"}  # bound once its struct is known
